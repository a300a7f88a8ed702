"""A rank's part of a parameter: its DTensor's boxes, from mesh and placements.

Along every side of a parameter a rank holds some runs of consecutive indices, nearly always one; a
box is one run of each side. The sides are those of the merged shape, in which blocks are cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from funshampoo.core.placed import is_in_parts

Shape: TypeAlias = tuple[int, ...]
Runs: TypeAlias = list[tuple[int, int]]
"""[(first index, length)], in order: a rank's indices along one side."""


class Box(NamedTuple):
    """`shape` indices from `offset` on, in the merged parameter.

    Attributes:
        local: where it starts in the rank's own part.
    """

    offset: Shape
    shape: Shape
    local: Shape


class Holding(NamedTuple):
    """One rank's part of one parameter.

    Attributes:
        shape: of the part, with the sides of the merged shape.
        boxes: those that make up the part; none if it is empty.
    """

    shape: Shape
    boxes: tuple[Box, ...]


def holding(x: Any, merged: Shape) -> Holding:
    """This rank's part of x (all of a plain tensor), without communication.

    Raises:
        NotImplementedError: placements from which the part can't be determined.
    """
    whole = tuple(x.shape)
    if not is_in_parts(x):
        return _held([[(0, n)] for n in merged])
    coordinate, mesh = x.device_mesh.get_coordinate(), tuple(x.device_mesh.shape)
    if coordinate is None:  # this rank is not in the mesh
        return Holding((0,) * len(merged), ())
    found, part = holding_at(whole, x.placements, mesh, coordinate, merged), x.to_local()
    if part.numel() != math.prod(found.shape):
        raise NotImplementedError(
            f"of a DTensor of shape {whole}, placed {tuple(x.placements)} on a mesh of {mesh}, "
            f"{tuple(part.shape)} is here, where {found.shape} was expected of {merged}: this "
            "sharding is not supported."
        )
    return found


def holding_at(
    shape: Shape, placements: Sequence[Any], mesh: Shape, coordinate: Sequence[int], merged: Shape
) -> Holding:
    """The part of the rank at a coordinate of the mesh; see `runs_of`.

    >>> from torch.distributed.tensor import Shard
    >>> holding_at((5, 4), [Shard(0)], (2,), (1,), (5, 4))
    Holding(shape=(2, 4), boxes=(Box(offset=(3, 0), shape=(2, 4), local=(0, 0)),))
    """
    sides = runs_of(shape, placements, mesh, coordinate)
    return _held(sides if merged == shape else merged_runs(sides, shape, merged))


def _held(sides: Sequence[Runs]) -> Holding:
    """The boxes of these runs: each is one run of every side."""
    starts = [[0, *itertools.accumulate(n for _, n in runs)] for runs in sides]
    boxes = []
    for pick in itertools.product(*[range(len(runs)) for runs in sides]):
        chosen = [runs[i] for runs, i in zip(sides, pick)]
        local = tuple(at[i] for at, i in zip(starts, pick))
        boxes.append(Box(tuple(o for o, _ in chosen), tuple(n for _, n in chosen), local))
    return Holding(tuple(at[-1] for at in starts), tuple(boxes))


def runs_of(
    shape: Shape, placements: Sequence[Any], mesh: Shape, coordinate: Sequence[int]
) -> list[Runs]:
    """The runs of every side on the rank at a coordinate of the mesh.

    Args:
        placements: one per mesh dimension; unsharded sides are whole everywhere.
        mesh: its shape.

    >>> from torch.distributed.tensor import Replicate, Shard
    >>> runs_of((5, 4), [Shard(0), Shard(1)], (2, 2), (1, 0))
    [[(3, 2)], [(0, 2)]]
    >>> runs_of((5, 4), [Replicate(), Shard(0)], (2, 4), (1, 3))
    [[], [(0, 4)]]
    """
    sides = []
    for side, length in enumerate(shape):
        runs = [(0, length)] if length else []
        mine = [i for i, p in enumerate(placements) if getattr(p, "dim", None) == side]
        order = _in_order(mine, [getattr(placements[i], "split_factor", 1) for i in mine], mesh)
        if order is not None:
            for i in order:
                runs = _chunk(runs, mesh[i], coordinate[i])
        else:  # each of split_factor pieces is sharded separately
            for i in mine:
                factor = getattr(placements[i], "split_factor", 1)
                pieces = [_chunk(runs, factor, k) for k in range(factor)]
                runs = [run for p in pieces for run in _chunk(p, mesh[i], coordinate[i])]
        sides.append(runs)
    return sides


def _in_order(mine: list[int], factors: list[int], mesh: Shape) -> list[int] | None:
    """The order in which mesh dimensions cut one side; None if no order fits the factors.

    A later mesh dimension cuts a smaller piece, unless `split_factor` says that the side already is
    in that many pieces: under FSDP2 on top of tensor parallelism the last one cuts first.

    >>> _in_order([0, 1], [1, 1], (2, 4)), _in_order([0, 1], [4, 1], (2, 4))
    ([0, 1], [1, 0])
    >>> _in_order([0], [3], (2, 4))
    """
    order: list[int] = []
    for i, factor in zip(reversed(mine), reversed(factors)):
        before = [math.prod(mesh[j] for j in order[:at]) for at in range(len(order) + 1)]
        if factor not in before:
            return None
        order.insert(before.index(factor), i)
    return order


def _chunk(runs: Runs, parts: int, k: int) -> Runs:
    """The k-th of this many parts, as from torch.chunk; the last ones may be empty."""
    total = sum(n for _, n in runs)
    size = -(-total // parts)
    return _between(runs, k * size, (k + 1) * size)


def _between(runs: Runs, start: int, stop: int) -> Runs:
    """Elements start..stop-1 of those in the runs."""
    found: Runs = []
    for first, length in runs:
        low, high = max(start, 0), min(stop, length)
        if low < high:
            found.append((first + low, high - low))
        start, stop = start - length, stop - length
    return found


def merged_runs(sides: Sequence[Runs], shape: Shape, merged: Shape) -> list[Runs]:
    """The runs of the merged sides: products of neighbours, without sides of 1.

    Raises:
        NotImplementedError: the merged shape does not consist of such products.

    >>> merged_runs([[(2, 2)], [(0, 3)], [(1, 1)]], (4, 3, 2), (12, 2))
    [[(6, 6)], [(1, 1)]]
    >>> merged_runs([[(0, 2)], [(1, 1)]], (2, 3), (6,))
    [[(1, 1), (4, 1)]]
    """
    found: list[Runs] = []
    at = 0
    for side in merged:
        runs, size = [(0, 1)], 1
        while at < len(shape) and (size < side or shape[at] == 1):
            runs = _times(runs, shape[at], sides[at])
            size, at = size * shape[at], at + 1
        if size != side:
            raise NotImplementedError(
                f"merge makes {merged} of a sharded parameter of shape {shape}; its sides have to "
                "be products of neighbours: use 'none', 'small' or 'matrix'."
            )
        found.append(runs)
    return found


def _times(outer: Runs, length: int, inner: Runs) -> Runs:
    """Runs of a side and of the next one, as runs of their product."""
    if inner == [(0, length)]:
        return [(first * length, n * length) for first, n in outer]
    return [
        (i * length + start, n)
        for first, count in outer
        for i in range(first, first + count)
        for start, n in inner
    ]
