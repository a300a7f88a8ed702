"""What a CUDA graph can record, and its recording."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

Replay: TypeAlias = Callable[[], Any]


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """What waits for the GPU inside: where, once it is over."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _recorded(run: Callable[[], None]) -> Replay | None:
    """A CUDA graph of what it launches, none of which happens now; None where it can't be one."""
    graph = torch.cuda.CUDAGraph()
    device = torch.cuda.current_device()
    pool = _POOLS.setdefault(device, torch.cuda.graph_pool_handle())
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(
            "cuda_graphed: a step could not be recorded, and runs as it is from now on: "
            f"{str(error).splitlines()[0]}",
            stacklevel=2,
        )
        return None
    return graph.replay


_POOLS: dict[int, Any] = {}
"""One a device: no graph leaves anything in it that another one, or the next replay, would need."""

RECORDERS: dict[str, Callable[[Callable[[], None]], Replay | None]] = {"cuda": _recorded}
"""By the kind of device."""
