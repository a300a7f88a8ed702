"""What a training run leaves behind, and medians over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tasks import Task


@dataclass(frozen=True)
class Point:
    """One evaluation: the mean training loss since the one before, and the test examples."""

    step: int
    train_loss: float
    test_loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One training run.

    `milliseconds` is the mean over its steps, since a median would leave out what happens only now
    and then, such as Shampoo's roots.
    """

    optimizer: str
    rate: float
    seed: int
    points: list[Point]
    milliseconds: float


@dataclass(frozen=True)
class Summary:
    """One optimizer at one learning rate: medians over the seeds, and the runs themselves."""

    optimizer: str
    rate: float
    steps_to_goal: float
    accuracy: float
    test_loss: float
    milliseconds: float
    runs: list[Run]


def summarize(task: Task, runs: Sequence[Run]) -> dict[str, list[Summary]]:
    """{optimizer: a summary of each rate}, in the order of the runs."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.optimizer, run.rate), []).append(run)
    summaries: dict[str, list[Summary]] = {}
    for (optimizer, rate), seeds in groups.items():
        last = [run.points[-1] for run in seeds]
        summary = Summary(
            optimizer=optimizer,
            rate=rate,
            steps_to_goal=median(steps_to_goal(task, run) for run in seeds),
            accuracy=median(point.accuracy for point in last),
            test_loss=median(finite_or_infinity(point.test_loss) for point in last),
            milliseconds=median(run.milliseconds for run in seeds),
            runs=seeds,
        )
        summaries.setdefault(optimizer, []).append(summary)
    return summaries


def steps_to_goal(task: Task, run: Run) -> float:
    """The step of the first evaluation that meets the goal; infinity if none does."""
    for point in run.points:
        if task.measure == "accuracy" and point.accuracy >= task.goal:
            return point.step
        if task.measure == "loss" and point.test_loss <= task.goal:
            return point.step
    return math.inf


def finite_or_infinity(loss: float) -> float:
    """A loss that is not a number counts as the worst."""
    return math.inf if math.isnan(loss) else loss


def best(summaries: Sequence[Summary]) -> Summary:
    """The rate that meets the goal first; among equals, the one with the lowest final test loss."""
    return min(summaries, key=lambda s: (s.steps_to_goal, s.test_loss))
