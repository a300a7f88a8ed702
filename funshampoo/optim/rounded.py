"""`stochastic_rounding` behind the chain of an optimizer, whose state keeps its names."""

from __future__ import annotations

from typing import Any, NamedTuple

from funshampoo.combinators.chaining import chain
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree
from funshampoo.state.meaning import meaning
from funshampoo.transforms.stochastic_rounding import RoundingState, stochastic_rounding


@meaning(seen="count")
class RoundedState(NamedTuple):
    """Of `rounded`: that of the transformation, and `RoundingState.seen`."""

    inner: State
    seen: Tree


def rounded(inner: GradientTransformation) -> GradientTransformation:
    """`inner` and then `stochastic_rounding`.

    In a chain of the two another clock would count, and a recipe that is no chain would get another
    name. So a run could not go on with the state that it had without rounding.

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
