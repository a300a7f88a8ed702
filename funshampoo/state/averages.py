"""The named tuples of stages that average weights for evaluation."""

from __future__ import annotations

from typing import NamedTuple

from funshampoo.state.meaning import meaning
from funshampoo.state.stages import Counter, LearningRateState, Tree


@meaning(
    evaluated="finite", fast="finite", total="nonnegative", largest="nonnegative", seen="count"
)
class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`: trees like the parameters, and per-block numbers, at least float32.

    Without own_steps the numbers are (), on the CPU, shared by all blocks.

    Attributes:
        evaluated: x, the average, with which to evaluate the model.
        fast: z, which makes the steps.
        total: (N,), the sum of the weights in the average.
        largest: (N,), the largest learning rate so far.
        seen: (N,), steps so far.
    """

    evaluated: Tree
    fast: Tree
    total: Tree
    largest: Tree
    seen: Tree
    rate: LearningRateState


@meaning(evaluated="finite", fast="finite")
class PrimalAverageState(NamedTuple):
    """State of `primal_average`: x and z as in `schedule_free`."""

    evaluated: Tree
    fast: Tree
    rate: LearningRateState


@meaning(evaluated="finite", buffer="finite")
class EmaNesterovState(NamedTuple):
    """State of `ema_nesterov`: weights without the look-ahead, and the average of their changes."""

    evaluated: Tree
    buffer: Tree
    steps: Counter


@meaning(evaluated="finite", weight="nonnegative")  # without beta it counts steps
class TailAverageState(NamedTuple):
    """State of `tail_average`: the average, and its total weight, (N,)."""

    evaluated: Tree
    weight: Tree
    steps: Counter


AVERAGES = (ScheduleFreeState, PrimalAverageState, EmaNesterovState, TailAverageState)
"""Those with a field `evaluated`."""
