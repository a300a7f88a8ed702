"""`stochastic_rounding` after the chain of an optimizer, without new names in its state."""

from __future__ import annotations

from typing import Any, NamedTuple

from funshampoo.combinators.chaining import chain
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree
from funshampoo.state.meaning import meaning
from funshampoo.transforms.stochastic_rounding import RoundingState, stochastic_rounding


@meaning(seen="count")
class RoundedState(NamedTuple):
    """State of `rounded`: the transformation's state, and `RoundingState.seen`."""

    inner: State
    seen: Tree


def rounded(inner: GradientTransformation) -> GradientTransformation:
    """`inner` followed by `stochastic_rounding`.

    A plain chain of the two would have another clock, and would rename the state of a recipe that
    is not a chain, so a run could not continue from the state that it had without rounding.

    State: `RoundedState`.
    """
    rounding = stochastic_rounding()
    both = chain(("inner", inner), ("rounding", rounding))

    def init(params: Tree, **context: Any) -> RoundedState:
        return RoundedState(inner.init(params, **context), rounding.init(params).seen)

    def update(
        updates: Tree, state: RoundedState, params: Tree, context: Context
    ) -> tuple[Tree, RoundedState]:
        states = {"inner": state.inner, "rounding": RoundingState(state.seen)}
        updates, new = both.run(updates, states, params, context)
        return updates, RoundedState(new["inner"], new["rounding"].seen)

    return GradientTransformation(
        init,
        update,
        inner.name,
        parts={"inner": inner},
        elementwise=inner.elementwise,
        needs_params=True,
        casts=inner.casts,
        minds_alive=False,
    )
