"""Which block of which parameter is where: static facts, from shapes and options only.

A parameter is reshaped to its *merged* shape and every side is cut at multiples of the block size.
All cuts but the last of a side are equal, so a parameter of order k falls into at most 2^k
*regions*, each a regular grid of equal blocks. A region is copied into its stack as one view,
without a loop over blocks, and takes consecutive rows there, in row-major order of the grid.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.stacked import Stacked
from funshampoo.core.tree import HALF
from funshampoo.state.places import Span

Merge: TypeAlias = Literal["none", "small", "matrix"] | Callable[[tuple[int, ...]], Sequence[int]]
LeafKeys: TypeAlias = tuple[tuple[Any, ...], ...]
"""For every leaf (shape, dtype, device, layout), as `core.fit` compares them."""


class Region(NamedTuple):
    """A grid of equal blocks of one parameter, and their rows in the stack.

    `block` has as many sides as the merged shape. For a `Stacked` parameter, the side that counts
    matrices is 1 there, and the stack's own blocks omit it.
    """

    stack: str
    first: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The number of its blocks."""
        return math.prod(self.grid)


class ParameterLayout(NamedTuple):
    """How one parameter is cut. `regions` are in row-major order, with `parts` regions per side.

    `stacked` is the side of the merged shape that counts matrices, if it is a stack of them.
    """

    shape: tuple[int, ...]
    merged: tuple[int, ...]
    parts: tuple[int, ...]
    regions: tuple[Region, ...]
    stacked: int | None = None


class Stack(NamedTuple):
    """Blocks of one shape, dtype and device: a tensor of shape (rows, *block)."""

    block: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: int


class Layout(NamedTuple):
    """The parameters in the order of the tree, the stacks by name, and both as nested keys.

    `described` has, for every parameter, the {stack: {span: ()}} of `BlockedState.layout`.
    """

    parameters: tuple[ParameterLayout, ...]
    stacks: dict[str, Stack]
    described: list[dict[str, dict[str, tuple[()]]]]


def merged_shape(
    shape: Sequence[int], max_size: int | None, merge: Merge = "small", keep: int = 2
) -> tuple[int, ...]:
    """The shape in which a parameter is cut.

    - "none": unchanged.
    - "small": drop sides of 1; walk the sides from last to first and multiply a side into the one
      after it while the product stays ≤ max_size and more than `keep` sides would remain.
    - "matrix": keep the first side and fold the others into one.
    - a function: its result for the shape. `Stacked` is one.

    A parameter of one element has the merged shape (1,) unless merge is "none" or a function.

    Raises:
        ValueError: a function returns a shape with another number of elements.

    >>> merged_shape((64, 3, 7, 7), 1024), merged_shape((128, 128, 3, 3), 1024)
    ((64, 147), (128, 128, 9))
    >>> merged_shape((32, 32), 1024), merged_shape((32, 32), 1024, keep=1)
    ((32, 32), (1024,))
    >>> merged_shape((128, 128, 3, 3), 1024, "matrix")
    (128, 1152)
    """
    if callable(merge):
        found = tuple(merge(tuple(shape)))
        if math.prod(found) != math.prod(shape):
            raise ValueError(f"merge makes {found} of the shape {tuple(shape)}.")
        return found
    if merge == "none":
        return tuple(shape)
    sides = [side for side in shape if side != 1] or [1]
    if merge == "matrix":
        return (sides[0], math.prod(sides[1:])) if len(sides) > 2 else tuple(sides)
    groups = [sides[-1]]
    for todo, side in zip(range(len(sides) - 1, 0, -1), reversed(sides[:-1])):
        fits = max_size is None or groups[-1] * side <= max_size
        if fits and len(groups) + todo > keep:
            groups[-1] *= side
        else:
            groups.append(side)
    return tuple(reversed(groups))


def leaf_keys(leaves: Sequence[Tensor]) -> LeafKeys:
    """The properties of the leaves that the layout depends on."""
    return tuple([(x.shape, x.dtype, x.device, x.layout) for x in leaves])


def layout_of(leaves: LeafKeys, max_size: int | None, merge: Merge, keep: int) -> Layout:
    """The layout of a tree with these leaves. Cached, except when torch.compile traces."""
    find = _layout if torch.compiler.is_dynamo_compiling() else _remembered_layout
    return find(leaves, max_size, merge, keep)


def _layout(leaves: LeafKeys, max_size: int | None, merge: Merge, keep: int) -> Layout:
    # Only half precision is stacked in a wider dtype: a gradient of integers must differ here.
    wide = [torch.float32 if dtype in HALF else dtype for _, dtype, *_ in leaves]
    several_dtypes = len(set(wide)) > 1
    several_devices = len({device for _, _, device, *_ in leaves}) > 1
    stacks: dict[str, Stack] = {}
    parameters = []
    for (given, _, device, *_), dtype in zip(leaves, wide):
        # A graph that has seen other sizes has symbols here: `range` makes torch read the number.
        shape = tuple([len(range(side)) for side in given])
        if 0 in shape:
            parameters.append(ParameterLayout(shape, shape, (), ()))
            continue
        merged = merged_shape(shape, max_size, merge, keep)
        cuts = [_cut(side, max_size) for side in merged]
        axis = merge.axis if isinstance(merge, Stacked) else None
        if axis is not None:
            cuts[axis] = [(merged[axis], 1, 0)]
        regions = []
        for parts in itertools.product(*cuts):
            grid, block, offset = tuple(zip(*parts)) if parts else ((), (), ())
            sides = tuple([side for i, side in enumerate(block) if i != axis])
            name = "x".join(map(str, sides)) or "scalar"
            name += f":{str(dtype).removeprefix('torch.')}" if several_dtypes else ""
            name += f"@{device}" if several_devices else ""
            first = stacks[name].rows if name in stacks else 0
            regions.append(Region(name, first, grid, block, offset))
            stacks[name] = Stack(sides, dtype, device, first + math.prod(grid))
        sizes = tuple(len(cut) for cut in cuts)
        parameters.append(ParameterLayout(shape, merged, sizes, tuple(regions), axis))
    return Layout(tuple(parameters), stacks, [_describe(p, max_size) for p in parameters])


_remembered_layout = functools.lru_cache(maxsize=256)(_layout)


def _describe(where: ParameterLayout, max_size: int | None) -> dict[str, dict[str, tuple[()]]]:
    described: dict[str, dict[str, tuple[()]]] = {}
    for region in where.regions:
        # All cuts but the last have the full size, so an offset is a whole number of them.
        origin = tuple(offset // (max_size or 1) for offset in region.offset)
        last = region.first + region.rows
        span = Span(region.first, last, region.grid, origin, where.stacked)
        described.setdefault(region.stack, {})[str(span)] = ()
    return described


def _cut(side: int, max_size: int | None) -> list[tuple[int, int, int]]:
    """(count, size, offset) of the full pieces of a side and of its ragged end.

    >>> _cut(20, 8), _cut(5, 8)
    ([(2, 8, 0), (1, 4, 16)], [(1, 5, 0)])
    """
    if max_size is None:
        return [(1, side, 0)]
    full, rest = divmod(side, max_size)
    pieces = [(full, max_size, 0)] if full else []
    return pieces + ([(1, rest, full * max_size)] if rest else [])
