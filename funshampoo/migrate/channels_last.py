"""Kernels that are stored with their channels last, worked on as if these came second."""

from __future__ import annotations

from typing import Any

from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree
from funshampoo.core.tree import map_leaves

_FIRST = (0, 3, 1, 2)
_LAST = (0, 2, 3, 1)


def channels_second(inner: GradientTransformation) -> GradientTransformation:
    """`inner` on kernels (out, height, width, in) as (out, in, height, width); others as they are.

    Which sides a `merge` of `blocked` brings together depends on their order. The state is that of
    `inner`, whose blocks are cut from the permuted kernel: `to_parameters` needs its shape.

    Args:
        inner: a transformation that takes nothing from around it but what goes with the leaves, as
            `blocked` is.
    """

    def init(params: Tree, **context: Any) -> State:
        return inner.init(_permuted(params, _FIRST), **context)

    def update(updates: Tree, state: State, params: Tree, context: Context) -> tuple[Tree, State]:
        seen = None if params is None else _permuted(params, _FIRST)
        found, state = inner.run(_permuted(updates, _FIRST), state, seen, context)
        return _permuted(found, _LAST), state

    return GradientTransformation(
        init, update, parts={"inner": inner}, state_of=lambda state, name: state
    )


def _permuted(tree: Tree, order: tuple[int, ...]) -> Tree:
    """Leaves of four sides in this order; None, and what is no such leaf, as it is."""
    return map_leaves(lambda x: x if x is None or x.ndim != 4 else x.permute(order), tree)
