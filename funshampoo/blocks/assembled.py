"""Block-space state in the shapes of the parameters, for inspection."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from funshampoo.blocks.layout import ParameterLayout, Region
from funshampoo.blocks.stacks import unstack_blocks
from funshampoo.core.contract import Tree
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.state.places import Span, stack_rows
from funshampoo.state.stages import BlockedState


def to_parameters(stacks: Mapping[str, Tensor], state: BlockedState, params: Tree) -> Tree:
    """Convert a tree over stacks, such as momentum in a `blocked` state, to one over parameters.

    Args:
        stacks: {stack: (N, *block)}, with all blocks: not from a `sharded` state on several ranks.
        state: that of the `blocked` that they come from.
        params: the parameters, for their shapes.

    Returns:
        A tree like params, of new tensors in the stacks' dtype.

    Raises:
        ValueError: the stacks, or the parameters, are not those of this state.

    >>> import torch
    >>> from funshampoo import blocked, trace
    >>> params = {"w": torch.zeros(3, 2)}
    >>> tx = blocked(trace(0.9), max_size=2)
    >>> _, state = tx.update({"w": torch.arange(6.0).reshape(3, 2)}, tx.init(params), params)
    >>> to_parameters(state.inner.buffer, state, params)["w"]
    tensor([[0., 1.],
            [2., 3.],
            [4., 5.]])
    """
    leaves, spec = flatten(params)
    names = leaf_names(params)
    if set(names) != set(state.layout):
        raise ValueError("the parameters are not those that the state was made for.")
    parameters = [layout_of_spans(state.layout[n], tuple(p.shape)) for n, p in zip(names, leaves)]
    if {name: len(x) for name, x in stacks.items()} != stack_rows(state):
        raise ValueError(
            "these are not all stacks of this state, with all their rows: on several ranks each "
            "has its own; funshampoo.state.state_dict names what it holds."
        )
    return spec.unflatten(unstack_blocks(stacks, parameters, leaves))


def layout_of_spans(
    spans: Mapping[str, Mapping[str, object]], shape: tuple[int, ...]
) -> ParameterLayout:
    """How a parameter is cut, parsed from the spans of `BlockedState.layout`."""
    parsed = [(stack, Span.parse(text)) for stack, texts in spans.items() for text in texts]
    parsed.sort(key=lambda item: item[1].origin)  # row-major, as they were cut
    if not parsed:
        return ParameterLayout(shape, shape, (), ())
    full = parsed[0][1].block(parsed[0][0])
    regions = tuple(
        Region(
            stack,
            span.first,
            span.grid,
            span.block(stack),
            tuple(o * side for o, side in zip(span.origin, full)),
        )
        for stack, span in parsed
    )
    parts = tuple(len({r.offset[i] for r in regions}) for i in range(len(full)))
    last = regions[-1]
    sides = zip(last.offset, last.grid, last.block)
    merged = tuple(offset + count * side for offset, count, side in sides)
    if math.prod(merged) != math.prod(shape):
        raise ValueError(f"a parameter of shape {shape} does not have the blocks of {merged}.")
    return ParameterLayout(shape, merged, parts, regions, parsed[0][1].stacked)
