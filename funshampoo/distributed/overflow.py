"""Updates that the dtype of the way can't hold: their blocks are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.operators.leaf_ops import per_block
from funshampoo.state.nodes import walk
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


def _guard(state: Any) -> tuple[tuple[str, ...], GuardedState] | None:
    for path, node in walk(state):
        if isinstance(node, GuardedState):
            return path, node
    return None


def _streaks(state: Any) -> list[Tensor]:
    """Copies, since a step may write to them."""
    found = _guard(state)
    return [] if found is None else [x.clone() for x in flatten(found[1].streak)[0]]


def _counted(state: Any, dead: Mapping[str, Tensor], before: list[Tensor]) -> Any:
    """One more block held, and its streak goes on, which the guard has ended."""
    found = _guard(state)
    if found is None:
        return state
    path, guard = found
    names = leaf_names(guard.held)
    held, spec = flatten(guard.held)
    streak = flatten(guard.streak)[0]
    for i, name in enumerate(names):
        if name in dead:
            mask = dead[name].view(held[i].shape)
            held[i] = held[i] + mask
            streak[i] = torch.where(mask, before[i] + 1, streak[i])
    return _put(
        state, path, guard._replace(held=spec.unflatten(held), streak=spec.unflatten(streak))
    )


def _put(node: Any, path: tuple[str, ...], value: Any) -> Any:
    """The state with another node at the end of this path of `walk`."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(node, dict):
        return {k: _put(x, rest, value) if str(k) == first else x for k, x in node.items()}
    if hasattr(node, "_replace"):
        return node._replace(**{first: _put(getattr(node, first), rest, value)})
    return type(node)([_put(x, rest, value) if str(i) == first else x for i, x in enumerate(node)])
