"""The named tuples of stages that know better weights than those that are trained."""

from __future__ import annotations

from typing import NamedTuple

from funshampoo.state.meaning import meaning
from funshampoo.state.stages import Counter, LearningRateState, Tree


@meaning(
    evaluated="finite", fast="finite", total="nonnegative", largest="nonnegative", seen="count"
)
class ScheduleFreeState(NamedTuple):
    """Of `schedule_free`: trees like the parameters, and of a number a block, float32 at least.

    Without own_steps the numbers are (), on the CPU, for all blocks together.

    Attributes:
        evaluated: x, the average, which the model is to be evaluated with.
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
    """Of `primal_average`: x and z as of `schedule_free`."""

    evaluated: Tree
    fast: Tree
    rate: LearningRateState


@meaning(evaluated="finite", buffer="finite")
class EmaNesterovState(NamedTuple):
    """Of `ema_nesterov`: the weights without the look-ahead, and the average of their changes."""

    evaluated: Tree
    buffer: Tree
    steps: Counter


@meaning(evaluated="finite", weight="nonnegative")  # without beta it counts steps
class TailAverageState(NamedTuple):
    """Of `tail_average`: the average, and (N,), the total weight of what is in it."""

    evaluated: Tree
    weight: Tree
    steps: Counter


AVERAGES = (ScheduleFreeState, PrimalAverageState, EmaNesterovState, TailAverageState)
"""Those with a field `evaluated`."""
