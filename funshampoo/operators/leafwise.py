"""Stages that change every leaf by itself, without a memory of its past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from funshampoo.core.adapting import name_of
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import with_traits
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.operators.last_stage import last_stage
from funshampoo.state.stages import LearningRateState


def leafwise(
    leaf: Callable[..., Tensor],
    numbers: Sequence[Any] = (),
    *,
    needs_params: bool = False,
    traits: Iterable[str] = (),
    **options: Any,
) -> GradientTransformation:
    """The stage U ← leaf(U, *numbers, block_ndim), or leaf(U, W, *numbers, block_ndim).

    Args:
        leaf: of U in its compute dtype, a tensor or a stack of blocks. The stage has the name of
            the function that `leaf` is defined in.
        numbers: hyperparameters; `leaf` gets their values on this step.
        needs_params: whether `leaf` gets W, the parameter, in U's dtype.
        traits: see `core.traits`.
        options: see `GradientTransformation`.
    """

    def changed(
        updates: Tree, params: Tree, *, block_ndim: int = 0, hyper: Numbers = NO_NUMBERS
    ) -> Tree:
        now = [number(x, hyper) for x in numbers]
        return _changed(leaf, updates, [params] if needs_params else [], *now, block_ndim)

    own = {"numbers": numbers, "needs_params": needs_params}
    return with_traits(stateless(changed, name_of(leaf), **own, **options), *traits)


def leafwise_at_rate(
    leaf: Callable[..., Tensor],
    learning_rate: Hyper | Schedule,
    numbers: Sequence[Any] = (),
    **options: Any,
) -> GradientTransformation:
    """The stage U ← leaf(U, W, learning_rate, *numbers, block_ndim), for the end of a chain.

    Args:
        leaf, numbers: as in `leafwise`.
        learning_rate: number, tensor, or schedule of the old step count.
        options: see `last_stage`.

    State: `LearningRateState`.
    """

    def init(params: Tree, *, clock: bool = False) -> LearningRateState:
        return LearningRateState(started(callable(learning_rate), clock))

    def update(
        updates: Tree, state: LearningRateState, params: Tree, context: Context
    ) -> tuple[Tree, LearningRateState]:
        rate = rate_of(learning_rate, state.steps, context)
        now = [number(x, context.hyper) for x in numbers]
        out = _changed(leaf, updates, [params], rate, *now, context.block_ndim)
        return out, LearningRateState(advanced(state.steps, context.donate))

    return last_stage(init, update, learning_rate, *numbers, name=name_of(leaf), **options)


def _changed(
    leaf: Callable[..., Tensor], updates: Tree, inputs: Sequence[Tree], *arguments: Any
) -> Tree:
    def one(u: Tensor, *weight: Tensor) -> tuple[Tensor]:
        u = wide(u)
        return (leaf(u, *[cast(w, u.dtype) for w in weight], *arguments),)

    return update_leaves(one, updates, (), inputs)[0]
