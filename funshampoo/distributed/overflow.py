"""Updates that the dtype of the way can't hold: their blocks are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.operators.leaf_ops import per_block
from funshampoo.state.nodes import first_state
from funshampoo.state.stages import GuardedState

Step = Callable[[Any, Put], Any]


def holding(step: Step, sent: Tensor, places: Mapping[str, Tensor]) -> Step:
    """The step, after which no block among what is sent has a number that is not finite.

    A block of which one has overflowed in the dtype of the way, or is NaN, is zeros there. The
    outermost `guarded` of the state counts it as it counts a gradient that is not finite. What the
    block has averaged has this step in it. Where looking waits for a device nobody looks.

    Args:
        sent: what this rank sends, padding included.
        places: {stack: (rows, *block)}, views of it.
    """

    def held(state: Any, put: Put) -> Any:
        before = _streaks(state)
        new = step(state, put)
        # A sum is finite only if all in it is; it may overflow by itself, and then all are judged.
        if sent.device.type == "cpu" and bool(sent.sum().isfinite()):
            return new
        dead = {}
        for stack, place in places.items():
            if place.numel():
                dead[stack] = ~place.reshape(len(place), -1).abs().amax(1).isfinite()
                place.masked_fill_(per_block(dead[stack], place), 0.0)
        return _counted(new, dead, before)

    return held


def _streaks(state: Any) -> list[Tensor]:
    """Copies, since a step may write to them."""
    guard = first_state(state, GuardedState)
    return [] if guard is None else [x.clone() for x in flatten(guard.streak)[0]]


def _counted(state: Any, dead: Mapping[str, Tensor], before: list[Tensor]) -> Any:
    """One more block held, and its streak goes on, which the guard has ended."""
    guard = first_state(state, GuardedState)
    if guard is None:
        return state
    names = leaf_names(guard.held)
    held, spec = flatten(guard.held)
    streak = flatten(guard.streak)[0]
    for i, name in enumerate(names):
        if name in dead:
            mask = dead[name].view(held[i].shape)
            held[i] = held[i] + mask
            streak[i] = torch.where(mask, before[i] + 1, streak[i])
    counted = guard._replace(held=spec.unflatten(held), streak=spec.unflatten(streak))

    def is_guard(node: Any) -> bool:
        return node is guard

    return optree.tree_map(
        lambda node: counted if is_guard(node) else node, state, is_leaf=is_guard, none_is_leaf=True
    )
