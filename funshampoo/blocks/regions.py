"""Copying or adding between rows of a stack and parameters, in one pass, in place.

For donated steps. `stacks` does the same with new tensors only, as required by torch.func and
torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout, Region
from funshampoo.core.modes import are_apart

Grid: TypeAlias = tuple[range, ...]
"""Blocks of a region, by their coordinates."""


class Piece(NamedTuple):
    """A view of a contiguous parameter, (*grid, *block), whose blocks are rows in order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    rows: int


class Part(NamedTuple):
    """Rows first..last-1 of a region of a parameter.

    Attributes:
        pieces: the views that make it up, in order.
    """

    parameter: int
    region: Region
    first: int
    last: int
    pieces: list[Piece]

    def views(self, leaf: Tensor, merged: tuple[int, ...]) -> list[Tensor]:
        """The pieces of this parameter, or of its gradient."""
        if leaf.is_contiguous():
            start = leaf.storage_offset()
            return [leaf.as_strided(p.shape, p.stride, start + p.offset) for p in self.pieces]
        return list(_views(viewed(leaf, merged), self.region, self.first, self.last))


class Rows(NamedTuple):
    """Where some rows of a stack come from.

    Attributes:
        whole: the parameters, if each row is one; else empty.
        as_is: whether all of these have a block's shape.
        counts: rows of all pieces, in order.
        shapes: the shapes of the pieces.
    """

    parts: list[Part]
    whole: list[int]
    as_is: bool
    counts: list[int]
    shapes: list[tuple[int, ...]]


_WAYS = 8  # to cut all rows: as one, in tiles, in tiles of a refresh, and between some gaps


class Parts(dict[tuple[str, range], Rows]):
    """{(stack, some of its rows): where they come from}, computed on first use.

    It is cleared once it holds more than a few ways to cut all rows: if different gradients are
    None from step to step, new spans keep coming, n² / 2 for a stack of n rows.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self._held = 0
        self._most = _WAYS * sum([stack.rows for stack in layout.stacks.values()])
        self._regions: dict[str, list[tuple[int, Region]]] = {s: [] for s in layout.stacks}
        for i, where in enumerate(layout.parameters):
            for region in where.regions:
                self._regions[region.stack].append((i, region))

    def __missing__(self, key: tuple[str, range]) -> Rows:
        parts = list(self._look_up(*key))
        pieces = [piece for part in parts for piece in part.pieces]
        uncut = all(part.region.block == self._merged(part) for part in parts)
        whole = [part.parameter for part in parts] if uncut else []
        shapes = [piece.shape for piece in pieces]
        block = self.layout.stacks[key[0]].block
        as_is = all([self.layout.parameters[i].shape == block for i in whole])
        self._held += len(parts)
        if self._held > self._most:
            self.clear()
            self._held = len(parts)
        found = self[key] = Rows(parts, whole, as_is, [piece.rows for piece in pieces], shapes)
        return found

    def _merged(self, part: Part) -> tuple[int, ...]:
        return self.layout.parameters[part.parameter].merged

    def _look_up(self, stack: str, rows: range) -> Iterator[Part]:
        for i, region in self._regions[stack]:
            first = max(rows.start - region.first, 0)
            last = min(rows.stop - region.first, region.rows)
            if first < last:
                outline = torch.empty(self.layout.parameters[i].merged, device="meta")
                views = _views(outline, region, first, last)
                yield Part(i, region, first, last, [_piece(view, region) for view in views])

    def gather(self, stack: str, rows: range, leaves: Sequence[Any]) -> Tensor:
        """These rows, (rows, *block), of the leaves. A view if possible."""
        found = self[stack, rows]
        block, dtype = self.layout.stacks[stack].block, self.layout.stacks[stack].dtype
        if found.whole:
            blocks = [leaves[i] for i in found.whole]
            if not found.as_is or any([x.dtype != dtype for x in blocks]):
                blocks = [x.reshape(block).to(dtype) for x in blocks]
            return torch.stack(blocks) if len(blocks) > 1 else blocks[0].contiguous().unsqueeze(0)
        views = self._views(found, leaves)
        if len(views) == 1:
            return views[0].reshape(len(rows), *block).to(dtype).contiguous()
        lines = None if views[0].is_cpu else _lines(views, len(block), dtype)
        if lines is not None:
            return torch.cat(lines).contiguous()
        target = torch.empty(len(rows), *block, dtype=dtype, device=views[0].device)
        torch._foreach_copy_(_split(target, found), views)
        return target

    def scatter(self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]) -> None:
        """Write rows to their places in contiguous leaves."""
        for view, own in zip(*self._targets(stack, rows, values, leaves)):
            view.copy_(own)

    def scatter_add(self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]) -> None:
        """Add rows to their places in contiguous leaves, rounded once to the leaf's dtype."""
        dtype = self.layout.stacks[stack].dtype
        views, own = self._targets(stack, rows, values, leaves)
        alike = values.dtype == dtype and all([view.dtype == dtype for view in views])
        if alike and are_apart(views, blocks=True):
            torch._foreach_add_(views, own)
            return
        for view, new in zip(views, own):
            if view.dtype == dtype:
                view.add_(new)
            else:
                view.copy_(torch.add(view.to(dtype), new))

    def _targets(
        self, stack: str, rows: range, values: Tensor, leaves: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the leaves, and the values for them."""
        found = self[stack, rows]
        if found.whole:
            block = self.layout.stacks[stack].block
            own = [leaves[i] if found.as_is else leaves[i].reshape(block) for i in found.whole]
            return own, list(values.unbind(0))
        return self._views(found, leaves), _split(values, found)

    def _views(self, found: Rows, leaves: Sequence[Any]) -> list[Tensor]:
        parts = found.parts
        return [v for p in parts for v in p.views(leaves[p.parameter], self._merged(p))]


def _split(values: Tensor, rows: Rows) -> list[Tensor]:
    """The rows of every piece, in its shape."""
    return [x.reshape(shape) for x, shape in zip(torch.split(values, rows.counts), rows.shapes)]


def _lines(views: Sequence[Tensor], order: int, dtype: torch.dtype) -> list[Tensor] | None:
    """The same rows as views (rows, *block) for a single torch.cat; or None.

    On a GPU, torch.cat copies them twice as fast as `_foreach_copy_`, for which most views are not
    plain memory: one launch for 128 of them instead of one each.
    """
    found: list[Tensor] = []
    for view in views:
        grid = view.ndim - order
        if type(view) is not Tensor or view.dtype != dtype or grid > 2 or order > _MOST_SIDES:
            return None
        if grid < 2:
            found.append(view if grid else view.unsqueeze(0))
        elif view.shape[1] == 1:
            found.append(view.squeeze(1))
        else:
            found.extend(view.unbind(0))
    return found


_MOST_SIDES = 3  # of a block, besides its row: torch copies more dimensions one by one


def _piece(view: Tensor, region: Region) -> Piece:
    count = math.prod(view.shape[: view.ndim - len(region.block)])
    return Piece(tuple(view.shape), view.stride(), int(view.storage_offset()), count)


def _views(x: Tensor, region: Region, first: int, last: int) -> Iterator[Tensor]:
    """Views (*grid, *block) of a merged parameter that hold these rows of the region in order.

    A side with one block is left out of the grid.
    """
    if region.block == x.shape:
        yield x
        return
    whole = grid_of_blocks(x, region)
    for grid in grids(first, last, region.grid):
        yield whole[tuple([r.start if len(r) == 1 else slice(r.start, r.stop) for r in grid])]


def viewed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x.reshape(shape), without an operator if x has that shape."""
    return x if x.shape == shape else x.reshape(shape)


def grid_of_blocks(x: Tensor, region: Region) -> Tensor:
    """The region of a merged parameter as (*grid, *block); a view."""
    split: list[int] = []
    for axis, (count, size, start) in enumerate(zip(region.grid, region.block, region.offset)):
        x = x.narrow(axis, start, count * size)
        split += (count, size)
    order = len(region.block)
    return x.view(split).permute(*range(0, 2 * order, 2), *range(1, 2 * order, 2))


def grids(first: int, last: int, grid: tuple[int, ...]) -> Iterator[Grid]:
    """The blocks first..last-1 of a grid in row-major order, as smaller grids.

    >>> list(grids(1, 6, (3, 2)))
    [(range(0, 1), range(1, 2)), (range(1, 3), range(0, 2))]
    """
    if first >= last:
        return
    if not grid:
        yield ()
        return
    line = math.prod(grid[1:])
    top, bottom = -(-first // line), last // line
    head = min(last, top * line)  # end of the first line, if it is incomplete
    yield from _of_line(top - 1, first, head, grid, line)
    if top < bottom:
        yield (range(top, bottom), *[range(n) for n in grid[1:]])
    yield from _of_line(bottom, max(head, bottom * line), last, grid, line)


def _of_line(at: int, first: int, last: int, grid: tuple[int, ...], line: int) -> Iterator[Grid]:
    for rest in grids(first - at * line, last - at * line, grid[1:]):
        yield (range(at, at + 1), *rest)
