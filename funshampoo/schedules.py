"""Schedules: functions of the number of steps done so far.

A schedule takes the old count (0 on the first step) as a tensor or an int and returns a
0-dimensional float32 tensor. If its rates are tensors it has their dtype, so that a gradient
through it keeps its precision. It does not branch on the count in Python, so it works in
torch.compile and under vmap. Any such function can be used instead.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_range
from funshampoo.core.contract import Hyper, Schedule

__all__ = ["constant", "cosine", "join", "linear", "polynomial", "warmup_cosine"]


def constant(value: Hyper) -> Schedule:
    """A constant schedule: `value` at every step.

    >>> constant(0.5)(3)
    tensor(0.5000)
    """
    _check_finite(value=value)

    def schedule(count: Tensor) -> Tensor:
        return _as_rate(value + 0 * _as_float64(count), value)

    return schedule


def polynomial(
    start: Hyper, end: Hyper, steps: int, *, power: float = 1.0, begin: int = 0
) -> Schedule:
    """Polynomial decay, `start` to `end` in `steps` steps, as (1 - x)^power; constant outside.

        x = clip((count - begin) / steps, 0, 1),  value = end + (start - end) (1 - x)^power

    >>> schedule = polynomial(1.0, 0.0, steps=4)
    >>> [schedule(count).item() for count in (0, 1, 2, 4, 9)]
    [1.0, 0.75, 0.5, 0.0, 0.0]
    """
    check_count("steps", steps)
    check_count("begin", begin, 0)
    _check_finite(start=start, end=end)
    check_range("power", power, 0.0, low_open=True)

    def schedule(count: Tensor) -> Tensor:
        x = torch.clamp((_as_float64(count) - begin) / steps, 0, 1)
        return _as_rate(end + (start - end) * (1 - x) ** power, start, end)

    return schedule


def linear(start: Hyper, end: Hyper, steps: int, *, begin: int = 0) -> Schedule:
    """Linear schedule from `start` to `end` in `steps` steps; for warm-up, linear(0, peak, steps).

    >>> warm_up = linear(0.0, 1.0, steps=4)
    >>> [warm_up(count).item() for count in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return polynomial(start, end, steps, begin=begin)


def cosine(start: Hyper, steps: int, *, end: Hyper = 0.0) -> Schedule:
    """Cosine schedule, `start` to `end` in `steps` steps (Loshchilov, Hutter, arXiv 1608.03983).

        value = end + (start - end) (1 + cos(π min(count/steps, 1))) / 2

    >>> schedule = cosine(1.0, steps=4)
    >>> [round(schedule(count).item(), 4) for count in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """
    check_count("steps", steps)
    _check_finite(start=start, end=end)

    def schedule(count: Tensor) -> Tensor:
        x = torch.clamp(_as_float64(count) / steps, 0, 1)
        return _as_rate(end + (start - end) * (1 + torch.cos(math.pi * x)) / 2, start, end)

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Join schedules one after the other; each counts from its own start.

    Args:
        schedules: n functions.
        boundaries: n - 1 increasing step counts at which the next one starts.

    Raises:
        ValueError: the lengths do not fit, or the boundaries do not increase.

    >>> schedule = join([linear(0.0, 1.0, 2), cosine(1.0, 4)], [2])
    >>> [round(schedule(count).item(), 4) for count in range(7)]
    [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, "
            f"got {len(boundaries)}."
        )
    if any(b <= a for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"boundaries must increase, got {list(boundaries)}.")

    def schedule(count: Tensor) -> Tensor:
        now = _as_counter(count)
        value = _as_tensor(schedules[0](now), now.device)
        for boundary, following in zip(boundaries, schedules[1:]):
            later = _as_tensor(following(now - boundary), now.device)
            value = torch.where(now >= boundary, later, value)
        return value

    return schedule


def warmup_cosine(peak: Hyper, warmup_steps: int, steps: int, *, end: Hyper = 0.0) -> Schedule:
    """Linear warm-up from 0 at count 0 to `peak`, then half a cosine to `end` at count `steps`.

    >>> schedule = warmup_cosine(1.0, warmup_steps=2, steps=6)
    >>> [round(schedule(count).item(), 4) for count in range(7)]
    [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    check_count("warmup_steps", warmup_steps, 0)
    check_count("steps", steps, warmup_steps + 1)
    _check_finite(peak=peak)
    decay = cosine(peak, steps - warmup_steps, end=end)
    if warmup_steps == 0:
        return decay
    return join([linear(0.0, peak, warmup_steps), decay], [warmup_steps])


def _check_finite(**values: Hyper) -> None:
    for name, value in values.items():
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's, too
        check_range(name, float(value) if real else value, -math.inf)


def _as_float64(count: Tensor | int | float) -> Tensor:
    # float32 counts every step only up to 2^24
    return _as_counter(count).to(torch.float64)


def _as_counter(count: Tensor | int | float) -> Tensor:
    # on the CPU, as counters are, whatever the default device
    return count if isinstance(count, Tensor) else torch.tensor(count, device="cpu")


def _as_rate(value: Tensor, *rates: Hyper) -> Tensor:
    given = [_as_tensor(rate, value.device).dtype for rate in rates]
    return value.to(functools.reduce(torch.promote_types, given))


def _as_tensor(rate: Hyper, device: torch.device) -> Tensor:
    if isinstance(rate, Tensor):
        return rate
    return torch.full((), rate, dtype=torch.float32, device=device)  # no copy from the host
