"""Elementwise stages on DTensors: they run on this rank's part, as if it were the whole.

Each number of such a stage's update depends only on the same number of gradient, state and
parameter, so a part's result is bitwise the same part of the whole. torch would send every operator
on every leaf through DTensor dispatch, which takes twenty times as long as a small operator.
"""

from __future__ import annotations

from typing import Any

import torch

from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Tree
from funshampoo.core.modes import is_traced
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.placed import (
    SEEN,
    any_in_parts,
    is_in_parts,
    local_parts,
    placed_again,
    places_of,
)
from funshampoo.core.tree import flatten


def local_step(updates: Tree, params: Tree, context: Context) -> LocalStep | None:
    """This rank's part of the trees of a step; None if the stage has to run on the full trees.

    It has to if there are no DTensors, if autograd or a transform tracks one, or sums are partial.
    """
    if not SEEN["any"] or is_traced():
        return None
    leaves, spec = flatten(updates)
    if not any_in_parts(leaves):
        return None
    known = leaves if params is None else flatten(params)[0]
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in leaves + known]):
        return None
    if params is None and any([_is_partial(x) for x in leaves]):
        return None
    step = LocalStep(leaves, spec)
    beside = (params, context.gradient, context.alive, *context.extra.values())
    if not all(map(step.fits, beside)):
        return None
    step.updates, step.params = step.local(updates), step.local(params)
    gradient, alive = step.local(context.gradient), step.local(context.alive)
    if context.gradient is updates:
        gradient = step.updates
    extra = {name: step.local(value) for name, value in context.extra.items()}
    step.context = changed(context, gradient=gradient, alive=alive, extra=extra)
    return step


class LocalStep:
    """The trees of a step, and this rank's part of them.

    Args:
        leaves, spec: of the updates, some of which are DTensors.

    Attributes:
        updates, params, context: with this rank's parts in place of DTensors.
    """

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self._leaves, self._spec, self._places = leaves, spec, places_of(leaves)
        self._everywhere: Any = ()  # placements of numbers that all ranks have
        self.updates: Tree = None
        self.params: Tree = None
        self.context = Context()

    def fits(self, tree: Tree) -> bool:
        """Whether a state, or another tree, has its DTensors where the updates have them.

        Trees over the parameters in it must be placed like the updates, and the rest replicated.
        """
        leaves, spec = flatten(tree)
        if not any_in_parts(leaves):
            return True
        if spec == self._spec:
            return all(map(self._lies_alike, leaves, self._leaves, self._places))
        if isinstance(tree, dict):
            tree = list(tree.values())
        if isinstance(tree, (tuple, list)):
            return all(map(self.fits, tree))
        return all([_is_whole(x) for x in leaves])

    def _lies_alike(self, x: Any, update: Any, place: Any) -> bool:
        """Whether each number of x is on the same ranks as that number of the update.

        Args:
            place: the update's, by `place_of`.
        """
        if x is None or update is None:
            return True
        if not is_in_parts(x):
            return place is None or x.ndim == 0
        placements = x.placements
        if x.ndim == 0:
            if placements != self._everywhere:  # those of the last one
                self._everywhere = placements if _is_whole(x) else ()
            return len(self._everywhere) > 0
        if place is None or x.shape != update.shape or tuple(placements) != tuple(place[1]):
            return False
        return bool(x.device_mesh == place[0])

    def local(self, tree: Tree) -> Tree:
        """The tree with this rank's parts in place of DTensors."""
        leaves, spec = flatten(tree)
        return spec.unflatten(local_parts(leaves)) if any_in_parts(leaves) else tree

    def stands(self, context: Context) -> None:
        """Move on to the next stage of a chain, whose place among the others this context has."""
        places = {name: getattr(context, name) for name in ("upstream", "earlier", "later")}
        self.context = changed(self.context, usable=context.usable, **places)

    def run(self, stage: GradientTransformation, state: Tree) -> tuple[Tree, Tree]:
        """(this rank's part of the updates, the state with DTensors where it had them).

        Args:
            stage: an elementwise transformation; its state `fits`.
        """
        before, spec = flatten(state)
        own = local_parts(before)
        found = stage.run(self.updates, spec.unflatten(own), self.params, self.context)
        out, new = checked_pair(found, stage.name)
        after, other = flatten(new)
        if other != spec:
            raise TypeError(f"{stage.name}: a state of another structure came out of the step.")
        return out, spec.unflatten(placed_again(before, own, after))

    def placed(self, updates: Tree) -> Tree:
        """Updates as DTensors again, from this rank's part of them."""
        found = self._spec.flatten_up_to(updates)
        return self._spec.unflatten(placed_again(self._leaves, local_parts(self._leaves), found))


def _is_whole(x: Any) -> bool:
    return not is_in_parts(x) or all([p.is_replicate() for p in x.placements])


def _is_partial(x: Any) -> bool:
    return is_in_parts(x) and any([p.is_partial() for p in x.placements])
