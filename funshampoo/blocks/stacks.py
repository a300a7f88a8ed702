"""Conversion of parameters to stacks of equal blocks, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout, ParameterLayout, Region, Stack
from funshampoo.blocks.regions import grid_of_blocks, viewed
from funshampoo.core.tree import compute_dtype, flatten


def stack_blocks(leaves: list[Tensor | None], layout: Layout) -> dict[str, Tensor]:
    """Gather leaves in stacks, {name: (rows, *block)}; None fills its rows with zeros.

    A stack with a single region may be a view of the leaf: stages only read their updates.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in layout.stacks}
    for leaf, where in zip(leaves, layout.parameters):
        for region in where.regions:
            pieces[region.stack].append(_cut_out(leaf, where, region, layout))
    return {name: _joined(parts, layout.stacks[name]) for name, parts in pieces.items()}


def rows_alive(alive: Any, layout: Layout) -> dict[str, Tensor]:
    """{stack: (rows,)} from one number per leaf, (), 0 or 1."""
    flags, _ = flatten(alive)
    pieces: dict[str, list[Tensor]] = {name: [] for name in layout.stacks}
    for i, where in enumerate(layout.parameters):
        for region in where.regions:
            fine = flags[i]
            if fine is None:  # without a gradient, so in no portion
                stack = layout.stacks[region.stack]
                fine = torch.ones((), dtype=stack.dtype, device=stack.device)
            pieces[region.stack].append(fine.expand(region.rows))
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _joined(parts: list[Tensor], stack: Stack) -> Tensor:
    """One stack from its pieces, each a block or rows of blocks: in one operator if possible."""
    order = len(stack.block)
    if len(parts) == 1:
        # Products round a strided matrix differently from the same one in its own stack.
        part = parts[0].contiguous()
        return part if part.ndim > order else part.unsqueeze(0)
    if all([part.ndim == order for part in parts]):
        return torch.stack(parts)
    return torch.cat([part if part.ndim > order else part.unsqueeze(0) for part in parts])


def unstack_blocks(
    stacks: Mapping[str, Tensor],
    parameters: Sequence[ParameterLayout],
    leaves: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Reassemble the blocks of every parameter; None where the leaf is None."""
    # Every stack is split once, into its regions in layout order.
    sizes: dict[str, list[int]] = {name: [] for name in stacks}
    for where in parameters:
        for region in where.regions:
            sizes[region.stack].append(region.rows)
    pieces = {name: iter(_parted(stacks[name], rows)) for name, rows in sizes.items()}
    return [
        _assemble([_paste(next(pieces[r.stack]), r) for r in where.regions], where, leaf)
        for leaf, where in zip(leaves, parameters)
    ]


def _parted(stack: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """The regions' rows, (rows, *block), or the block itself if each region has just one."""
    return stack.unbind(0) if all([n == 1 for n in rows]) else torch.split(stack, rows)


def _cut_out(leaf: Tensor | None, where: ParameterLayout, region: Region, layout: Layout) -> Tensor:
    """One region as (rows, *block): slice, split every side into (grid, block), grid axes first.

    A parameter that is a single block is (*block) instead.
    """
    stack = layout.stacks[region.stack]
    if leaf is None:
        return torch.zeros(region.rows, *stack.block, dtype=stack.dtype, device=stack.device)
    if region.block == where.merged:
        return viewed(leaf, stack.block).to(stack.dtype)
    grid = grid_of_blocks(leaf.reshape(where.merged), region)
    return grid.reshape((region.rows, *stack.block)).to(stack.dtype)


def _paste(rows: Tensor, region: Region) -> Tensor:
    """Undo `_cut_out`: (rows, *block) to the region of the merged parameter."""
    if region.rows == 1:
        return viewed(rows, region.block)
    order = len(region.block)
    axes = [axis for i in range(order) for axis in (i, order + i)]
    sides = [count * size for count, size in zip(region.grid, region.block)]
    return rows.reshape((*region.grid, *region.block)).permute(axes).reshape(sides)


def _assemble(pieces: list[Tensor], where: ParameterLayout, leaf: Tensor | None) -> Tensor | None:
    """Join the regions of a parameter, last axis first."""
    if leaf is None:
        return None
    if not pieces:
        return torch.zeros_like(leaf, dtype=compute_dtype(leaf))
    for axis in range(len(where.parts) - 1, -1, -1):
        n = where.parts[axis]
        if n > 1:
            pieces = [torch.cat(pieces[i : i + n], axis) for i in range(0, len(pieces), n)]
    return viewed(pieces[0], where.shape)
