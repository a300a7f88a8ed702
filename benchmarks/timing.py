"""Interleaved timing in one process: A B C A B C ..., back to back, medians with quartiles.

Interleaving lets drift of the machine (frequency, neighbours, temperature) hit everybody alike.
Nothing pauses between two steps: after a pause of 50 ms, a first step takes up to 8 times as long.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Contender(NamedTuple):
    """Something whose steps are timed.

    Attributes:
        name: of its rows in the table.
        step: makes one step.
        prepare: called before each step, outside the clock.
        kind: of the step with this number (from 1), such as "plain" or "refresh"; None leaves a
            step out.
        kinds: all that `kind` can return.
    """

    name: str
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    kind: Callable[[int], str | None] = lambda t: "plain"
    kinds: tuple[str, ...] = ("plain",)


class Run(NamedTuple):
    """One timed step."""

    contender: str
    kind: str
    step: int
    seconds: float


class Times(NamedTuple):
    """Seconds: median, quartiles, and how many runs they are of."""

    median: float
    low: float
    high: float
    runs: int

    @property
    def in_ms(self) -> dict[str, float]:
        """For the table and the JSON."""
        return {
            "ms": 1e3 * self.median,
            "ms_low": 1e3 * self.low,
            "ms_high": 1e3 * self.high,
            "runs": self.runs,
        }


def interleave(
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    seconds: float,
    least: Mapping[str, int],
    first: int = 1,
    warmup: int = 2,
    steps: int | None = None,
    shuffled: bool = False,
) -> list[Run]:
    """Step all contenders in turn.

    Args:
        contenders: in the order of their turns.
        device: what to wait for before the clock is read.
        seconds: no new round begins later than this after the warm-up, once everybody has its
            `least` runs.
        least: {kind: runs} that every contender with steps of this kind gets.
        first: number of the first step.
        warmup: rounds that are not recorded.
        steps: this many rounds after the warm-up, whatever the seconds.
        shuffled: every round has an order of its own, the same in every run.
    """
    runs: list[Run] = []
    wanted = {(c.name, kind): least.get(kind, 1) for c in contenders for kind in c.kinds}
    begun = 0.0
    for t in itertools.count(first):
        if t == first + warmup:
            begun = time.perf_counter()
        turns = random.Random(t).sample(contenders, len(contenders)) if shuffled else contenders
        for contender in turns:
            contender.prepare()
            kind = contender.kind(t)
            elapsed = timed(contender.step, device)
            if t >= first + warmup and kind is not None:
                runs.append(Run(contender.name, kind, t, elapsed))
                wanted[contender.name, kind] -= 1
        late = time.perf_counter() - begun >= seconds and max(wanted.values()) <= 0
        done = t + 1 - first - warmup
        if done > 0 and (late if steps is None else done >= steps):
            break
    return runs


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, up to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(seconds: Iterable[float]) -> Times:
    """Median and quartiles.

    >>> times([3.0, 1.0, 2.0])
    Times(median=2.0, low=1.5, high=2.5, runs=3)
    """
    values = sorted(seconds)
    if len(values) < 2:
        return Times(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median, low, high, len(values))


def times_of(runs: Sequence[Run], contender: str, kind: str = "plain") -> Times | None:
    """Of one contender's steps of one kind; None where there are none."""
    found = [run.seconds for run in runs if run.contender == contender and run.kind == kind]
    return times(found) if found else None


def repeated(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, least: int
) -> dict[str, Times]:
    """Times of functions without a state, in turn."""
    contenders = [Contender(name, function) for name, function in functions.items()]
    runs = interleave(contenders, device=device, seconds=seconds, least={"plain": least}, warmup=1)
    found = {name: times_of(runs, name) for name in functions}
    return {name: spread for name, spread in found.items() if spread is not None}
