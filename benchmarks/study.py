"""Sweeps over rates and seeds that can be interrupted: one JSON line a run, means and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks import ensemble
from benchmarks.ensemble import Method, Run, Task

MIDDLE = range(-5, -1)  # 0.003, 0.01, 0.03, 0.1
FARTHEST = 6  # steps of the grid beyond


class Entry(NamedTuple):
    """One method of a study."""

    method: Method
    averages: bool = False


class Store:
    """A file of JSON lines, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append, at once, so that an interrupted study goes on after the last ensemble."""
        new = [dict(line) for line in lines]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
        self.lines += new

    def runs(self, task: str, name: str) -> list[Run]:
        """Of one method on one task."""
        mine = [x for x in self.lines if (x["task"], x["method"]) == (task, name) and "seed" in x]
        return [Run(**{field: line[field] for field in Run._fields}) for line in mine]

    def costs(self, task: str) -> dict[str, dict[str, Any]]:
        """{method: what a step takes}, the latest; "" is the gradient."""
        return {x["method"]: x for x in self.lines if x["task"] == task and "ms" in x}


class Result(NamedTuple):
    """A method at its best rate, the least mean loss at the end.

    Attributes:
        runs: one for every seed, at this rate.
        tried: all by which it was chosen.
    """

    rate: float
    runs: list[Run]
    at_edge: bool
    tried: list[Run]

    @property
    def losses(self) -> list[float]:
        """At the end, a number for every seed."""
        return [run.final for run in self.runs]


def rate_of(k: int) -> float:
    """The grid, for all the same: 10^(k/2) to one digit, 0.01, 0.03, 0.1, ...

    >>> [rate_of(k) for k in (-5, -4, -3, 0, 1)]
    [0.003, 0.01, 0.03, 1.0, 3.0]
    """
    return float(f"{10 ** (k / 2):.0e}")


def sweep(
    store: Store, task: Task, name: str, entry: Entry, tuning: int, seeds: int, grow: bool = True
) -> Result:
    """Run what the file lacks: the middle of the grid, then on from an edge while that is best.

    Best by the loss at the end, or by the steps to the goal.

    Args:
        tuning: with how many seeds the rate is chosen; `seeds` are run at the chosen one.
    """
    low, high = min(MIDDLE), max(MIDDLE)
    while True:
        wanted = [(k, s) for k in range(low, high + 1) for s in range(tuning)]
        _fill(store, task, name, entry, wanted)
        tried = [run for run in store.runs(task.name, name) if run.seed < tuning]
        rates = {rate_of(k): k for k in range(low, high + 1)}
        k = rates[min(rates, key=lambda rate: mean(r.final for r in tried if r.rate == rate))]
        soonest = [rates[rate] for rate in _soonest(tried) if rate in rates]
        room = max(min(MIDDLE) - low, high - max(MIDDLE)) < FARTHEST
        edges = {low, high} & {k, *soonest[:1]}
        if not (grow and room and edges):
            break
        low, high = (low - 1, high) if low in edges else (low, high + 1)
    _fill(store, task, name, entry, [(k, s) for s in range(seeds)])
    runs = [r for r in store.runs(task.name, name) if r.rate == rate_of(k) and r.seed < seeds]
    return Result(rate_of(k), sorted(runs, key=lambda run: run.seed), k in (low, high), tried)


def _soonest(runs: Sequence[Run]) -> list[float]:
    """The rates at which all seeds met the goal, those of the fewest steps first."""
    rates = sorted({run.rate for run in runs})
    met = {rate: [run.reached for run in runs if run.rate == rate] for rate in rates}
    sure = {rate: [t for t in steps if t is not None] for rate, steps in met.items()}
    return sorted((r for r in rates if len(sure[r]) == len(met[r])), key=lambda r: mean(sure[r]))


def _fill(
    store: Store, task: Task, name: str, entry: Entry, wanted: Sequence[tuple[int, int]]
) -> None:
    there = {(run.rate, run.seed) for run in store.runs(task.name, name)}
    members = [(rate_of(k), seed) for k, seed in wanted if (rate_of(k), seed) not in there]
    if members:
        runs = ensemble.train(task, entry.method, members, entry.averages)
        store.add({"task": task.name, "method": name, **run._asdict()} for run in runs)


def with_error(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error of the mean."""
    if not all(map(math.isfinite, values)):
        return "∞"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values))


def steps_to_goal(runs: Sequence[Run]) -> str:
    """Mean ± standard error over the seeds that met it, and how many did where not all."""
    met = [run.reached for run in runs if run.reached is not None]
    if not met:
        return "never"
    some = f" ({len(met)} of {len(runs)})" if len(met) < len(runs) else ""
    return with_error(met, 0) + some


def fewest_steps(runs: Sequence[Run]) -> str:
    """The least mean of steps to the goal, over the rates at which all seeds met it."""
    rates = _soonest(runs)
    if not rates:
        return "never by all"
    steps = [run.reached for run in runs if run.rate == rates[0] and run.reached is not None]
    return f"{with_error(steps, 0)} at {rates[0]:g}"
