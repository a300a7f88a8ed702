"""How much a step asks of a device: operators, kernels, bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device.group import Row, in_a_line
from benchmarks.memory import peak_bytes

MOST = 8  # kernels that are named


class _Counted(TorchDispatchMode):
    """Counts the operators that are called inside, views and foreach operators as one each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def demands(step: Callable[[], Any], device: torch.device, *, eager: bool = True) -> Row:
    """Three more calls: operators, kernels (on a GPU), and the peak of bytes above what was held.

    Operators are counted of what is not compiled; a mode would have a graph made anew.
    """
    row: Row = {}
    if eager:
        with _Counted() as counted:
            step()
        row["operators"] = counted.count
    if device.type == "cuda":
        row |= kernels(step, device)
    row["peak_mib"] = peak_bytes(step, device) / 2**20
    return row


def kernels(step: Callable[[], Any], device: torch.device) -> Row:
    """Launches as the profiler records them, and how long the device was at work on them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        # acc_events: there is one cycle, and torch 2.11 warns that it keeps no others.
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
            step()
            torch.cuda.synchronize(device)
        found = [e for e in record.events() if e.device_type.name == "CUDA" and not _is_label(e)]
        busy = sum(e.time_range.elapsed_us() for e in found)
    except Exception as error:  # without a driver's permission, say
        return {"kernels_error": in_a_line(error)}
    copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in found)
    row = {"kernels": len(found) - copies, "copies": copies, "busy_ms": 1e-3 * busy}
    return row | {"dearest": _dearest(found)}


def _dearest(events: Iterable[Any]) -> list[str]:
    """The kernels that take most of the time: ms, calls and what they are called."""
    calls: dict[str, list[float]] = {}
    for e in events:
        calls.setdefault(e.name, []).append(1e-3 * e.time_range.elapsed_us())
    ordered = sorted(calls.items(), key=lambda item: -sum(item[1]))
    return [f"{sum(ms):.3f} {len(ms)} {name[:70]}" for name, ms in ordered[:MOST]]


def _is_label(event: Any) -> bool:
    """What spans several kernels, as torch.optim's steps have it."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")


def held_mib(tree: Any) -> float:
    """MiB of all tensors in nested containers."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size() / 2**20
    if isinstance(tree, dict):
        return sum(map(held_mib, tree.values()))
    return sum(map(held_mib, tree)) if isinstance(tree, list | tuple) else 0.0
