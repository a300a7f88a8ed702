"""Scaling by a constant, or by minus the learning rate."""

from __future__ import annotations

from funshampoo.core.checks import check_flags, check_range, check_rate
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import DIRECTED, FLIPS, MAY_FLIP, with_traits
from funshampoo.core.tree import update_columns
from funshampoo.operators.columns import Column, in_compute_dtype, multiply
from funshampoo.state.stages import LearningRateState


def scale(factor: Hyper) -> GradientTransformation:
    """Multiply the updates by a constant, in float32 or wider: U ← factor U.

    >>> import torch
    >>> scale(-0.5).update({"w": torch.ones(2)}, ())[0]
    {'w': tensor([-0.5000, -0.5000])}
    """
    check_range("factor", factor, float("-inf"))

    def scaled(updates: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        return _times(updates, number(factor, hyper))

    stage = stateless(scaled, "scale", numbers=[factor], elementwise=True)
    keeps = isinstance(factor, (int, float)) and factor >= 0
    return stage if keeps else with_traits(stage, MAY_FLIP)


def scale_by_learning_rate(
    learning_rate: Hyper | Schedule, *, flip_sign: bool = True
) -> GradientTransformation:
    """Multiply by minus the learning rate, U ← -learning_rate U: the last stage of a chain.

    Args:
        learning_rate: a number ≥ 0, a 0-dimensional tensor (which may be batched or differentiated,
            and is read again on every step), or a schedule: a function of the number of steps done
            so far, 0 on the first step.
        flip_sign: False keeps the sign.

    State: `LearningRateState`.

    Raises:
        ValueError: a negative number.

    >>> import torch
    >>> tx = scale_by_learning_rate(lambda count: 0.1 * 2.0 ** -count)
    >>> state = tx.init({"w": torch.zeros(1)})
    >>> for _ in range(3):
    ...     u, state = tx.update({"w": torch.ones(1)}, state)
    ...     print(u["w"])
    tensor([-0.1000])
    tensor([-0.0500])
    tensor([-0.0250])
    """
    check_rate(learning_rate)
    check_flags(flip_sign=flip_sign)
    sign = -1 if flip_sign else 1
    scheduled = callable(learning_rate)

    def init(params: Tree, *, clock: bool = False) -> LearningRateState:
        return LearningRateState(started(scheduled, clock))

    def update(
        updates: Tree, state: LearningRateState, params: Tree, context: Context
    ) -> tuple[Tree, LearningRateState]:
        rate = rate_of(learning_rate, state.steps, context)
        new = LearningRateState(advanced(state.steps, context.donate))
        return _times(updates, sign * rate), new

    stage = GradientTransformation(
        init, update, counts=scheduled, numbers=[learning_rate], elementwise=True
    )
    return with_traits(stage, DIRECTED, FLIPS) if flip_sign else stage


def _times(updates: Tree, factor: Hyper) -> Tree:
    def scaled(u: Column) -> tuple[Column]:
        return (multiply(in_compute_dtype(u), factor),)

    return update_columns(scaled, updates, ())[0]
