"""Stages that change every leaf by itself, without a memory of its past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from funshampoo.core.adapting import check_places, name_of
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, is_ours, number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import MAY_FLIP, with_traits
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.operators.last_stage import last_stage
from funshampoo.state.stages import LearningRateState


def leafwise(
    leaf: Callable[..., Tensor],
    numbers: Sequence[Any] = (),
    *,
    name: str = "",
    needs_params: bool = False,
    traits: Iterable[str] = (),
    **options: Any,
) -> GradientTransformation:
    """The stage U ← leaf(U, *numbers, block_ndim), or leaf(U, W, *numbers, block_ndim).

    Args:
        leaf: a function of U, in its compute dtype: a leaf of the updates, block_ndim 0, or a stack
            of blocks, block_ndim 1.
        numbers: hyperparameters; `leaf` gets their values on this step.
        name: of the stage; by default that of the function that defines `leaf`.
        needs_params: whether `leaf` gets W, the parameter, in U's dtype.
        traits: see `core.traits`.
        options: see `GradientTransformation`.

    Raises:
        TypeError: leaf is no function, or takes other arguments; numbers is no list; on a step,
            leaf returned no new update.

    >>> import torch
    >>> def soft_threshold(least):
    ...     def shrunk(u, least, block_ndim):
    ...         return u.sign() * (u.abs() - least).clamp(min=0)
    ...
    ...     return leafwise(shrunk, [least])
    >>> tx, params = soft_threshold(1.0), {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([3.0, -0.5])}, tx.init(params))[0]
    {'w': tensor([2., -0.])}
    """
    if not callable(leaf):
        raise TypeError(f"leaf is {leaf!r}; give a function of an update that returns the new one.")
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"numbers is {numbers!r}; give a list of hyperparameters.")
    given = ["u", *["w"] * needs_params, *["number"] * len(numbers), "block_ndim"]
    remedy = "needs_params=True adds the parameter w, and numbers=[...] the hyperparameters"
    check_places(leaf, "leaf", given, (), remedy)

    def changed(
        updates: Tree, params: Tree, *, block_ndim: int = 0, hyper: Numbers = NO_NUMBERS
    ) -> Tree:
        now = [number(x, hyper) for x in numbers]
        return _changed(leaf, updates, [params] if needs_params else [], *now, block_ndim)

    own = {"numbers": numbers, "needs_params": needs_params}
    if not is_ours(leaf):  # as of any stage of a user's: see `first_traits`
        traits = (*traits, MAY_FLIP)
    return with_traits(stateless(changed, name or name_of(leaf), **own, **options), *traits)


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
    scheduled = callable(learning_rate)

    def init(params: Tree, *, clock: bool = False) -> LearningRateState:
        return LearningRateState(started(scheduled, clock))

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
        found = leaf(u, *[cast(w, u.dtype) for w in weight], *arguments)
        fits = isinstance(found, Tensor) and found.shape == u.shape and found.is_floating_point()
        if not fits:
            raise TypeError(
                f"the function of an update {tuple(u.shape)} returned {_said(found)}; return the "
                "new update, a floating-point tensor of that shape."
            )
        return (found,)

    return update_leaves(one, updates, (), inputs)[0]


def _said(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor {tuple(found.shape)} of {found.dtype}"
    return repr(found)
