"""Taking turns under a clock: on a GPU by its events, on a CPU by the host's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.device.group import in_a_line
from benchmarks.timing import synchronize, times


class Reading(NamedTuple):
    """Seconds of one call.

    Attributes:
        device: from its first work on the device to the end of its last.
        host: until the call returned, which on a GPU may be earlier.
    """

    device: float
    host: float


def read(function: Callable[[], Any], device: torch.device) -> tuple[Reading, Any]:
    """One call, and what it returned."""
    synchronize(device)
    if device.type != "cuda":
        begun = time.perf_counter()
        found = function()
        elapsed = time.perf_counter() - begun
        return Reading(elapsed, elapsed), found
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    begun = time.perf_counter()
    found = function()
    host = time.perf_counter() - begun
    end.record()
    end.synchronize()
    return Reading(1e-3 * start.elapsed_time(end), host), found


def working(
    functions: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], list[dict[str, str]]]:
    """Those that run, and a line for each that raises: nobody else has to suffer for it."""
    fine, lines = {}, []
    for name, function in functions.items():
        try:
            function()
        except Exception as error:
            lines.append({"of": name, "error": in_a_line(error)})
        else:
            fine[name] = function
    return fine, lines


def turns(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
    most: int = 50,
    warmup: int = 3,
) -> dict[str, list[Reading]]:
    """Readings of all, in rounds of another order each.

    Args:
        functions: by name.
        device: whose clock it is.
        seconds: no round begins later than this, once there are `least`; none at all begins later
            than four times this.
        least, most: rounds.
        warmup: rounds before, without the clock.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    readings: dict[str, list[Reading]] = {name: [] for name in functions}
    begun = time.monotonic()
    for n in range(most if functions else 0):
        spent = time.monotonic() - begun
        if n and spent >= (seconds if n >= least else 4 * seconds):
            break
        for name in random.Random(n).sample(list(functions), len(functions)):
            readings[name].append(read(functions[name], device)[0])
    return readings


def summary(readings: Sequence[Reading]) -> dict[str, float]:
    """Median and quartiles of the device's time, and the median of the host's, in ms."""
    host = times(r.host for r in readings)
    return times(r.device for r in readings).in_ms | {"host_ms": 1e3 * host.median}
