"""Intersections of a box with an owner's rows, as strided views on both sides.

A region is a grid of equal blocks. Along a side, a box contains the end of one block, whole blocks,
and the beginning of another; so its intersection with the region consists of at most 3^k grids of
equal parts of blocks, each one view of the rank's part, and one view of the owner's rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.layout import Region
from funshampoo.blocks.regions import grids
from funshampoo.core.boxes import Box, Shape


class View(NamedTuple):
    """Strides and offset in a contiguous tensor, in elements."""

    stride: Shape
    offset: int


class Piece(NamedTuple):
    """A grid of equal parts of blocks.

    Attributes:
        shape: (*grid, *part), without sides of 1, and coalesced.
        local: its view of the holder's part of the parameter.
        rows: its view of the owner's rows of the stack.
    """

    shape: Shape
    local: View
    rows: View

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


def as_view(x: Tensor, shape: Shape, view: View) -> Tensor:
    """The given view of a contiguous tensor."""
    return x.as_strided(shape, view.stride, x.storage_offset() + view.offset)


def strides(shape: Sequence[int]) -> Shape:
    """Strides of a contiguous tensor.

    >>> strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])


class _Part(NamedTuple):
    """Along a side: `blocks`, and the `length` indices from `start` on in each."""

    blocks: range
    start: int
    length: int


def _parts(low: int, high: int, block: int) -> list[_Part]:
    """The indices low..high-1 of a side that is cut into blocks.

    >>> [tuple(part) for part in _parts(3, 14, 4)]
    [(range(0, 1), 3, 1), (range(1, 3), 0, 4), (range(3, 4), 0, 2)]
    """
    first, start = divmod(low, block)
    last, rest = divmod(high, block)
    found = []
    if start:
        found.append(_Part(range(first, first + 1), start, min(block, start + high - low) - start))
        first += 1
    if first < last:
        found.append(_Part(range(first, last), 0, block))
    if rest and last >= first:
        found.append(_Part(range(last, last + 1), 0, rest))
    return found


def pieces(region: Region, rows: range, at: int, box: Box, part: Shape) -> Iterator[Piece]:
    """The intersection of a box with some rows of a stack.

    Args:
        rows: of one owner; only those in this region count.
        at: index of the first of them among all rows that the owner has of this stack.
        part: shape of the holder's part of the parameter.
    """
    sides = []
    for o, n, start, count, block in zip(
        box.offset, box.shape, region.offset, region.grid, region.block
    ):
        low, high = max(o, start) - start, min(o + n, start + count * block) - start
        sides.append(_parts(low, high, block) if low < high else [])
    if not all(sides):
        return
    first = max(rows.start, region.first)
    last = min(rows.stop, region.first + region.rows)
    in_part, in_block, in_grid = strides(part), strides(region.block), strides(region.grid)
    numel = math.prod(region.block)
    origin = region.first - rows.start + at  # the owner's row for the region's first block
    moved = [r - b + q for r, b, q in zip(region.offset, box.offset, box.local)]
    for own in grids(first - region.first, last - region.first, region.grid):
        for cut in itertools.product(*sides):
            grid = [
                range(max(a.start, p.blocks.start), min(a.stop, p.blocks.stop))
                for a, p in zip(own, cut)
            ]
            if not all(grid):
                continue
            local, row, inner = 0, origin, 0
            for g, p, m, b, s, t, u in zip(
                grid, cut, moved, region.block, in_part, in_grid, in_block
            ):
                local += (g.start * b + p.start + m) * s
                row += g.start * t
                inner += p.start * u
            shape = [*map(len, grid), *[p.length for p in cut]]
            here = [b * s for b, s in zip(region.block, in_part)] + [*in_part]
            there = [t * numel for t in in_grid] + [*in_block]
            found, (in_local, in_rows) = coalesced(shape, here, there)
            yield Piece(found, View(in_local, local), View(in_rows, row * numel + inner))


def coalesced(shape: Sequence[int], *views: Sequence[int]) -> tuple[Shape, list[Shape]]:
    """Drop sides of 1, and merge adjacent sides that are contiguous in all of these strides.

    What is contiguous on both ends becomes one run. The order of elements is kept, so a rank that
    knows only one end, and merges fewer sides, puts the same into a message.

    >>> coalesced((1, 3, 4, 5), (0, 20, 5, 1), (0, 100, 5, 1))
    ((3, 20), [(20, 1), (100, 1)])
    >>> coalesced((1,), (7,))
    ((1,), [(1,)])
    """
    sides: list[tuple[int, list[int]]] = []
    for n, *steps in zip(shape, *views):
        if n == 1:
            continue
        if sides and sides[-1][1] == [n * step for step in steps]:
            sides[-1] = sides[-1][0] * n, steps
        else:
            sides.append((n, steps))
    sides = sides or [(1, [1] * len(views))]
    return tuple(n for n, _ in sides), [tuple(own) for own in zip(*[steps for _, steps in sides])]


class Cuts:
    """Views of a flat tensor, made by one operator for all disjoint runs.

    Args:
        views: their shapes and positions.
        numel: of the flat tensor.
    """

    def __init__(self, views: Sequence[tuple[Shape, View]], numel: int) -> None:
        runs = {(view.offset, shape[0]) for shape, view in views if view.stride == (1,)}
        at, places = 0, dict[tuple[int, int], int]()
        self._sizes: list[int] = []
        for start, length in sorted(runs):
            if start < at:  # overlaps the previous one: cut by itself
                continue
            self._sizes += [start - at, length] if start > at else [length]
            places[start, length] = len(self._sizes) - 1
            at = start + length
        self._sizes.append(numel - at)
        self._views = [
            (shape, view, places.get((view.offset, shape[0])) if view.stride == (1,) else None)
            for shape, view in views
        ]

    def of(self, flat: Tensor) -> list[Tensor]:
        """The views of this tensor, (numel,)."""
        runs = torch.split(flat, self._sizes)
        return [
            as_view(flat, shape, view) if i is None else runs[i] for shape, view, i in self._views
        ]
