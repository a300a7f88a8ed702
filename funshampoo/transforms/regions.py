"""Rows of a stack, and the same numbers in the parameters: copied or added in one pass, in place.

For donated steps. `stacks` does the same with new tensors alone, as torch.func and torch.compile
need it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.transforms.layout import Layout, Region
from funshampoo.tree import cast


class Part(NamedTuple):
    """Rows first..last-1 of a region of a parameter.

    Attributes:
        whole: the parameter is a single block.
    """

    parameter: int
    region: Region
    first: int
    last: int
    whole: bool


class Parts:
    """Which parameters the rows of a stack belong to. Looked up once for each span of rows."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._regions: dict[str, list[tuple[int, Region, bool]]] = {s: [] for s in layout.stacks}
        for i, where in enumerate(layout.parameters):
            for region in where.regions:
                whole = region.block == where.merged
                self._regions[region.stack].append((i, region, whole))
        self._found: dict[tuple[str, int, int], list[Part]] = {}

    def of(self, stack: str, rows: range) -> list[Part]:
        """The parts that these rows consist of, in order."""
        key = stack, rows.start, rows.stop
        if key not in self._found:
            self._found[key] = list(self._look_up(stack, rows))
        return self._found[key]

    def _look_up(self, stack: str, rows: range) -> Iterator[Part]:
        for i, region, whole in self._regions[stack]:
            first = max(rows.start - region.first, 0)
            last = min(rows.stop - region.first, region.rows)
            if first < last:
                yield Part(i, region, first, last, whole)

    def gather(self, stack: str, rows: range, leaves: Sequence[Any]) -> Tensor:
        """These rows, (rows, *block), of the leaves. A view where it can be."""
        parts = self.of(stack, rows)
        block, dtype = self.layout.stacks[stack].block, self.layout.stacks[stack].dtype
        if all([part.whole for part in parts]):
            blocks = [cast(viewed(leaves[part.parameter], block), dtype) for part in parts]
            return torch.stack(blocks) if len(blocks) > 1 else blocks[0].contiguous().unsqueeze(0)
        pieces = self._pieces(parts, leaves)
        if len(pieces) == 1:
            return pieces[0].reshape(len(rows), *block).to(dtype).contiguous()
        target = torch.empty(len(rows), *block, dtype=dtype, device=pieces[0].device)
        for piece, own in _side_by_side(pieces, target, len(block)):
            own.copy_(piece)
        return target

    def scatter(self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]) -> None:
        """Write rows to where they belong in contiguous leaves."""
        for piece, own in self._targets(stack, rows, values, leaves):
            piece.copy_(own)

    def scatter_add(self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]) -> None:
        """Add rows to where they belong in contiguous leaves, rounded once to the leaf's dtype."""
        dtype = self.layout.stacks[stack].dtype
        same = all([leaves[part.parameter].dtype == dtype for part in self.of(stack, rows)])
        targets = self._targets(stack, rows, values, leaves)
        if same and values.dtype == dtype and len(targets) > 1:
            torch._foreach_add_([piece for piece, _ in targets], [own for _, own in targets])
            return
        for piece, own in targets:
            if piece.dtype == dtype:
                piece.add_(own)
            else:
                piece.copy_(torch.add(piece.to(dtype), own))

    def _targets(
        self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]
    ) -> list[tuple[Tensor, Tensor]]:
        """[(view of a leaf, the values for it)]."""
        parts = self.of(stack, rows)
        block = self.layout.stacks[stack].block
        if all([part.whole for part in parts]):
            flat = [viewed(leaves[part.parameter], block) for part in parts]
            return list(zip(flat, values.unbind(0)))
        return _side_by_side(self._pieces(parts, leaves), values, len(block))

    def _pieces(self, parts: Sequence[Part], leaves: Sequence[Any]) -> list[Tensor]:
        """Views of the leaves, each (*grid, *block), that hold the rows in order."""
        pieces: list[Tensor] = []
        for part in parts:
            merged = self.layout.parameters[part.parameter].merged
            x = viewed(leaves[part.parameter], merged)
            if part.whole:
                pieces.append(x)
            else:
                grid = _grid_of_blocks(x, part.region)
                pieces += _rows_of_grid(grid, len(merged), part.first, part.last)
        return pieces


def viewed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x.reshape(shape), without an operator where it has that shape."""
    return x if x.shape == shape else x.reshape(shape)


def _grid_of_blocks(x: Tensor, region: Region) -> Tensor:
    """The region of a merged parameter as (*grid, *block); a view."""
    split: list[int] = []
    for axis, (count, size, start) in enumerate(zip(region.grid, region.block, region.offset)):
        x = x.narrow(axis, start, count * size)
        split += (count, size)
    order = len(region.block)
    return x.view(split).permute(*range(0, 2 * order, 2), *range(1, 2 * order, 2))


def _rows_of_grid(view: Tensor, order: int, first: int, last: int) -> Iterator[Tensor]:
    """Smaller grids of blocks that hold the blocks first..last-1 of one, in row-major order.

    Args:
        view: (*grid, *block), with `order` sides of a block.
    """
    if view.ndim == order:
        yield view
        return
    line = math.prod(view.shape[1 : view.ndim - order])  # blocks that follow along the first side
    top, bottom = -(-first // line), last // line
    if top > bottom:  # all within one
        start = bottom * line
        yield from _rows_of_grid(view[bottom], order, first - start, last - start)
        return
    if first < top * line:
        yield from _rows_of_grid(view[top - 1], order, first - (top - 1) * line, line)
    if top < bottom:
        yield view[top:bottom]
    if bottom * line < last:
        yield from _rows_of_grid(view[bottom], order, 0, last - bottom * line)


def _side_by_side(
    pieces: Sequence[Tensor], rows: Tensor, order: int
) -> list[tuple[Tensor, Tensor]]:
    """Every piece with its share of the rows, in its shape."""
    pairs = []
    first = 0
    for piece in pieces:
        count = math.prod(piece.shape[: piece.ndim - order])
        pairs.append((piece, rows.narrow(0, first, count).reshape(piece.shape)))
        first += count
    return pairs
