"""Who sends which piece to whom: all-to-alls to the owners, one per portion, and one back.

    gather     the pieces of gradients (and of parameters that a stage reads), to the owner
    scatter    the pieces of updates, from the owner to all that hold them

Both are derived from the boxes of all ranks and the owners of all rows, in the same order
everywhere, so a message needs no description. Messages are as long as their contents, without
padding to the longest.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout, Region
from funshampoo.core.boxes import Box, Holding, Shape
from funshampoo.distributed.pieces import Piece, pieces, strides
from funshampoo.distributed.shards import STATUS, OwnedRows

ALIGNMENT = 16  # bytes, at which pieces start in a message
HEAD = STATUS * 4  # bytes: the sender's status, in float32

Column: TypeAlias = int
"""What a piece belongs to: `GRADIENTS`, `PARAMETERS` or, on the way back, updates."""

GRADIENTS, PARAMETERS = 0, 1

Boxes: TypeAlias = dict[tuple[Shape, Shape], list[int]]
"""{(offset, shape): the ranks that hold this box}"""


class Slot(NamedTuple):
    """A piece in a message."""

    column: Column
    parameter: int
    stack: str
    piece: Piece


class Route:
    """One direction, as seen by one rank.

    Attributes:
        out, into: for every rank, the pieces sent to it and received from it.
        stay: the pieces that this rank already has.
    """

    def __init__(self, size: int) -> None:
        self.out: list[list[Slot]] = [[] for _ in range(size)]
        self.into: list[list[Slot]] = [[] for _ in range(size)]
        self.stay: list[Slot] = []

    def add(self, slot: Slot, source: int, target: int, rank: int) -> None:
        """Add a piece that goes from one rank to another, if it concerns this rank."""
        if source == target == rank:
            self.stay.append(slot)
        elif source == rank:
            self.out[target].append(slot)
        elif target == rank:
            self.into[source].append(slot)

    def arriving(self) -> list[Slot]:
        """The pieces that this rank has afterwards: those that stay, and those received."""
        return [*self.stay, *itertools.chain.from_iterable(self.into)]


class Routes(NamedTuple):
    """Both directions, as seen by one rank."""

    gather: Route
    scatter: Route


class Shares(NamedTuple):
    """Which ranks hold which parts of a block.

    Attributes:
        boxes: [(the ranks that hold it, how many numbers of the block are in it)].
        of_rank: {rank: how many numbers of the block it holds}; {} if all hold all.
    """

    boxes: tuple[tuple[Sequence[int], int], ...]
    of_rank: dict[int, int]


class Held:
    """Which ranks hold which parts of every parameter.

    Args:
        everyone: for every rank, what it holds of every parameter.
        nodes: the node of every rank; by default all are on one.

    Attributes:
        boxes: for every parameter {(offset, shape): the ranks that hold this box}, in the same
            order on all ranks.
    """

    def __init__(
        self, everyone: Sequence[Sequence[Holding]], nodes: Sequence[int] | None = None
    ) -> None:
        self.everyone, self.size = everyone, len(everyone)
        self.nodes = [0] * self.size if nodes is None else nodes
        holders = functools.cache(_holders)  # one object for all that are held alike
        self.boxes: list[Boxes] = [holders(of_parameter) for of_parameter in zip(*everyone)]

    def of_blocks(self, layout: Layout) -> dict[str, list[Shares]]:
        """{stack: the shares of every row}; blocks that are held alike share one object."""
        found: dict[str, list[Shares]] = {s: [] for s in layout.stacks}
        known: dict[Any, Shares] = {}
        for where, boxes in zip(layout.parameters, self.boxes):
            cut = [
                axis
                for axis, side in enumerate(where.merged)
                if any(shape[axis] != side for _, shape in boxes)
            ]
            for region in where.regions:
                for at in itertools.product(*map(range, region.grid)):
                    key = id(boxes), region[2:], tuple(at[axis] for axis in cut)
                    if key not in known:
                        offset = [o + i * b for o, i, b in zip(region.offset, at, region.block)]
                        known[key] = self._shares(boxes, tuple(offset), region.block)
                    found[region.stack].append(known[key])
        return found

    def _shares(self, boxes: Boxes, offset: Shape, block: Shape) -> Shares:
        meeting = [(ranks, _common(offset, block, *key)) for key, ranks in boxes.items()]
        met = tuple((ranks, common) for ranks, common in meeting if common)
        shares: dict[int, int] = {}
        for ranks, common in met:
            if len(ranks) < self.size:
                for rank in ranks:
                    shares[rank] = shares.get(rank, 0) + common
        return Shares(met, shares)


def _common(offset: Shape, shape: Shape, other: Shape, other_shape: Shape) -> int:
    """How many indices two boxes have in common."""
    count = 1
    for a, n, b, m in zip(offset, shape, other, other_shape):
        count *= max(0, min(a + n, b + m) - max(a, b))
    return count


def find_routes(
    layout: Layout, owned: Sequence[OwnedRows], held: Held, shown: Sequence[bool], rank: int
) -> Routes:
    """The routes of one rank.

    Args:
        owned: the rows being sent, all or some, and their owners, as in `Shards`; an owner's rows
            are counted among these.
        shown: which parameters are sent with their gradients.

    Raises:
        RuntimeError: no rank holds some part of a block that this rank owns.
    """
    routes = Routes(Route(held.size), Route(held.size))
    runs = _runs(owned)
    starts = {stack: [run.rows.start for run in found] for stack, found in runs.items()}

    def add(parameter: int, region: Region, run: _Run) -> None:
        """This rank's pieces of a run's rows of a region, as their owner and as a holder."""
        boxes, mine = held.boxes[parameter], held.everyone[rank][parameter]
        own = {(box.offset, box.shape): box for box in mine.boxes}
        columns = (GRADIENTS, PARAMETERS) if shown[parameter] else (GRADIENTS,)
        found = 0
        for key in boxes if run.owner == rank else sorted(own):
            box = own.get(key, Box(*key, (0,) * len(key[0])))
            source = source_of(boxes[key], run.owner, held.nodes)
            for piece in pieces(region, run.rows, run.at, box, mine.shape):
                found += piece.numel
                for column in columns:
                    slot = Slot(column, parameter, region.stack, piece)
                    routes.gather.add(slot, source, run.owner, rank)
                slot = Slot(GRADIENTS, parameter, region.stack, piece)
                for holder in boxes[key]:
                    routes.scatter.add(slot, run.owner, holder, rank)
        if run.owner == rank:
            _check_complete(found, region, run.rows)

    for i, where in enumerate(layout.parameters):
        for region in where.regions:
            known = starts.get(region.stack, [])
            first = max(bisect.bisect_right(known, region.first) - 1, 0)
            last = bisect.bisect_left(known, region.first + region.rows)
            for run in runs.get(region.stack, [])[first:last]:
                if run.rows.stop > region.first:
                    add(i, region, run)
    return routes


class _Run(NamedTuple):
    """Consecutive rows of one owner; `at` is the index of the first among all its rows."""

    owner: int
    rows: range
    at: int


def _runs(owned: Sequence[OwnedRows]) -> dict[str, list[_Run]]:
    """{stack: its runs, in the order of the rows}."""
    found: dict[str, list[_Run]] = {}
    before: dict[tuple[str, int], int] = {}
    for piece in owned:  # each owner's are in the order of the rows
        at = before.get((piece.stack, piece.owner), 0)
        found.setdefault(piece.stack, []).append(_Run(piece.owner, piece.all_rows, at))
        before[piece.stack, piece.owner] = at + piece.rows
    return {stack: sorted(own, key=lambda run: run.rows.start) for stack, own in found.items()}


def _holders(held: tuple[Holding, ...]) -> Boxes:
    """{(offset, shape) of a box: the ranks that hold it}, in one order on all ranks."""
    found: dict[tuple[Shape, Shape], list[int]] = {}
    for rank, of_rank in enumerate(held):
        for box in of_rank.boxes:
            found.setdefault((box.offset, box.shape), []).append(rank)
    return dict(sorted(found.items()))


def source_of(ranks: Sequence[int], owner: int, nodes: Sequence[int]) -> int:
    """Which of several holders sends its gradient: one on the owner's node, the nearest by number.

    All of them have the same values.

    >>> source_of([1, 3, 9], owner=4, nodes=[0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    9
    """
    return min(ranks, key=lambda r: (nodes[r] != nodes[owner], abs(r - owner), r))


def _check_complete(found: int, region: Region, rows: range) -> None:
    count = min(rows.stop, region.first + region.rows) - max(rows.start, region.first)
    if found != count * math.prod(region.block):
        raise RuntimeError(
            f"of {count * math.prod(region.block)} numbers in blocks of {region.block} the ranks "
            f"of the process group hold {found}: give sharded a group with all ranks that have a "
            "part of the parameters, each of them once."
        )


class Messages:
    """The bytes of all outgoing or incoming messages: heads, and aligned pieces.

    Args:
        slots: for every rank.
        dtypes: {(column, parameter): dtype as sent}.
        head: bytes in front of every message, `HEAD` or none.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Slot]],
        dtypes: Mapping[tuple[Column, int], torch.dtype],
        head: int = 0,
    ) -> None:
        self.slots = [slot for of_rank in slots for slot in of_rank]
        self.splits: list[int] = []
        self._heads: list[int] = []
        self._places: list[tuple[torch.dtype, int, Shape]] = []
        at = 0
        for of_rank in slots:
            start = at
            self._heads.append(at)
            at += head
            for slot in of_rank:
                dtype = dtypes[slot.column, slot.parameter]
                self._places.append((dtype, at // dtype.itemsize, slot.piece.shape))
                used = slot.piece.numel * dtype.itemsize
                at += -(-used // ALIGNMENT) * ALIGNMENT
            self.splits.append(at - start)
        self.bytes = at

    def buffer(self, device: torch.device) -> Tensor:
        """(bytes,) uint8, with zeros between pieces."""
        return torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """One contiguous view per slot, in its dtype and shape."""
        typed = {dtype: buffer.view(dtype) for dtype in {place[0] for place in self._places}}
        return [
            typed[dtype].as_strided(shape, strides(shape), start)
            for dtype, start, shape in self._places
        ]

    def heads(self, buffer: Tensor) -> Tensor:
        """The statuses, (ranks, STATUS) float32."""
        return torch.stack([buffer[at : at + HEAD].view(torch.float32) for at in self._heads])

    def put_head(self, buffer: Tensor, status: Tensor) -> None:
        """Write a status, (STATUS,) float32, at the head of every message."""
        for at in self._heads:
            buffer[at : at + HEAD].view(torch.float32).copy_(status)
