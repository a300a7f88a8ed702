"""What a transformation shards: blocks of `blocked`, and leaves of `sharded` elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.layout import Stack
from funshampoo.core.contract import GradientTransformation
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.distributed.ownership import Works, works_of
from funshampoo.state.places import Place, block_of, map_tensors, stack_rows
from funshampoo.state.stages import BlockedState, ShardedState


class Scope(NamedTuple):
    """Blocks that are sharded together: one collective per step returns their updates.

    Attributes:
        blocks: {stack, or leaf: shape and number}; dtypes are ignored.
        works: {stack, or leaf: the work of a step, besides passing over it}.
        state_bytes: {stack, or leaf: bytes of state of one block}.
        in_blocks: whether they are stacks.
    """

    blocks: dict[str, Stack]
    works: Works
    state_bytes: dict[str, int]
    in_blocks: bool


def scopes_of(transformation: GradientTransformation, state: Any, params: Any) -> list[Scope]:
    """All scopes of a transformation, in the order in which they run.

    Raises:
        ValueError: there are none.
    """
    leaves, _ = flatten(params)
    shapes = {name: tuple(p.shape) for name, p in zip(leaf_names(params), leaves)}
    found = [_scope(*pair, shapes) for pair in _shared(transformation, state)]
    if not found:
        raise ValueError(
            "transformation contains 0 blocked(...) and 0 sharded(...), so there is nothing to "
            "share out. Make the recipe with distribute=funshampoo.sharded, which shares out its "
            "leaves."
        )
    return found


def _shared(
    transformation: GradientTransformation, state: Any
) -> Iterator[tuple[GradientTransformation, BlockedState | ShardedState]]:
    if isinstance(state, BlockedState | ShardedState):
        yield transformation, state
        return
    for name, part in transformation.parts.items():
        yield from _shared(part, transformation.state_of(state, name))


def _scope(
    transformation: GradientTransformation,
    state: BlockedState | ShardedState,
    shapes: Mapping[str, tuple[int, ...]],
) -> Scope:
    in_blocks = isinstance(state, BlockedState)
    rows = stack_rows(state) if isinstance(state, BlockedState) else dict.fromkeys(state.owned, 1)
    shape = {name: block_of(name) if in_blocks else shapes[name] for name in rows}
    works = works_of(transformation, shape, state if in_blocks else ())
    meta = torch.float32, torch.device("meta")
    stacks = {name: Stack(block, *meta, rows[name]) for name, block in shape.items()}
    state_bytes = dict.fromkeys(rows, 0)

    def add(place: Place, x: Tensor) -> None:
        name = place.stack if in_blocks else ".".join(place.leaf)
        if name in state_bytes and (x.ndim or not in_blocks):  # shared entries belong to no block
            state_bytes[name] += x.nbytes // stacks[name].rows

    map_tensors(add, state)
    return Scope(stacks, works, state_bytes, in_blocks)
