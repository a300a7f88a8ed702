"""Who sends what: the places of all blocks in one gathered buffer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout
from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ownership import Work, Works, owners_of

STATUS = 8
"""Numbers of float32 at the end of each shard: FAILED, INTERRUPTED, CHANGED or 0, the
four of the failure report, a fingerprint of what all ranks have in common, the number of the step,
and on a run's first step a sum of the bits that the rank has for it; they are eight, so that the
length is whole in float64."""

FAILED, INTERRUPTED, CHANGED = 1.0, 2.0, 3.0


class Equal(NamedTuple):
    """`rows` equal blocks."""

    block: tuple[int, ...]
    rows: int


class Blocks(NamedTuple):
    """All blocks that are shared out.

    Attributes:
        stacks: in block space the stacks; else the leaves, each a stack of one row.
        device: of all.
        dtype: in which every update fits.
        in_blocks: whether they are stacks.
    """

    stacks: dict[str, Equal]
    device: torch.device
    dtype: torch.dtype
    in_blocks: bool

    @classmethod
    def of(cls, layout: Layout) -> Blocks:
        """The stacks of a layout."""
        stacks = layout.stacks.values()
        blocks = {name: Equal(s.block, s.rows) for name, s in layout.stacks.items()}
        return settled(blocks, [s.device for s in stacks], [s.dtype for s in stacks], True)


def settled(
    stacks: dict[str, Equal],
    devices: Sequence[torch.device],
    dtypes: Sequence[torch.dtype],
    in_blocks: bool,
) -> Blocks:
    """`Blocks` on one device.

    Raises:
        ValueError: there are several.
    """
    if len(set(devices)) > 1:
        raise ValueError(
            "sharded: the parameters are on several devices; one buffer can't hold them. Use one "
            "sharded(...) a device, by partition(...)."
        )
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Blocks(stacks, devices[0] if devices else torch.device("cpu"), dtype, in_blocks)


class Piece(NamedTuple):
    """Consecutive rows of one stack that have one owner."""

    stack: str
    first: int
    rows: int
    owner: int

    @property
    def all_rows(self) -> range:
        """The rows of the full stack."""
        return range(self.first, self.first + self.rows)


class Shards(NamedTuple):
    """The buffer: one shard a rank, all of `length` elements, each with its pieces and a status.

    Attributes:
        pieces: by owner, and for each owner in the order of the stacks.
        used: elements of each rank's shard before padding.
        length: elements of a shard, status included.
        status: elements of the buffer's dtype that hold STATUS numbers of float32.
    """

    blocks: dict[str, Equal]
    pieces: tuple[Piece, ...]
    used: tuple[int, ...]
    length: int
    status: int

    def owned_by(self, rank: int) -> dict[str, Piece]:
        """{stack: the rows of this rank}, without the stacks of which it has none."""
        return {piece.stack: piece for piece in self.pieces if piece.owner == rank}

    def numel(self, piece: Piece) -> int:
        """Elements of a piece."""
        return piece.rows * math.prod(self.blocks[piece.stack].block)

    def split_sizes(self) -> list[int]:
        """How the gathered buffer falls apart: every rank's pieces, padding, status."""
        sizes: list[int] = []
        for rank, used in enumerate(self.used):
            sizes += [self.numel(piece) for piece in self.pieces if piece.owner == rank]
            sizes += [self.length - self.status - used, self.status]
        return sizes


def find_shards(
    blocks: Mapping[str, Equal],
    world_size: int,
    every: int,
    cost: CostModel,
    dtype: torch.dtype,
    works: Works | None = None,
) -> Shards:
    """The shards for these stacks. Remembered.

    Args:
        dtype: of the buffer.
        works: of `owners_of`, as the other arguments are.
    """
    known = tuple((works or {}).items())
    return _find_shards(tuple(blocks.items()), world_size, every, cost, dtype, known)


@functools.lru_cache(maxsize=64)
def _find_shards(
    blocks: tuple[tuple[str, Equal], ...],
    world_size: int,
    every: int,
    cost: CostModel,
    dtype: torch.dtype,
    works: tuple[tuple[str, Work], ...],
) -> Shards:
    stacks = dict(blocks)
    owners = owners_of(stacks, world_size, every, cost, dict(works))
    return shards_of(stacks, owners, world_size, dtype)


def shards_of(
    stacks: dict[str, Equal],
    owners: Mapping[str, Sequence[int]],
    world_size: int,
    dtype: torch.dtype,
) -> Shards:
    """The shards where `owners` has the owner of every row."""
    pieces = []
    for stack, ranks in owners.items():
        first = 0
        for owner, run in itertools.groupby(ranks):
            rows = len(list(run))
            pieces.append(Piece(stack, first, rows, owner))
            first += rows
    pieces.sort(key=lambda piece: piece.owner)  # stable: within an owner by stack
    sizes = [p.rows * math.prod(stacks[p.stack].block) for p in pieces]
    used = [0] * world_size
    for piece, size in zip(pieces, sizes):
        used[piece.owner] += size
    status = STATUS * 4 // dtype.itemsize
    # A shard starts where eight bytes do, so that the status can be read as another dtype.
    length = -(-max(used) // 4) * 4 + status
    return Shards(stacks, tuple(pieces), tuple(used), length, status)


def places_in_shard(shard: Tensor, shards: Shards, rank: int) -> dict[str, Tensor]:
    """Where the rows that this rank owns go in its shard, (length,): views (rows, *block)."""
    places: dict[str, Tensor] = {}
    start = 0
    for stack, piece in shards.owned_by(rank).items():
        size = shards.numel(piece)
        place = shard.narrow(0, start, size)
        places[stack] = place.view(piece.rows, *shards.blocks[stack].block)
        start += size
    return places


def status_of(shard: Tensor, shards: Shards) -> Tensor:
    """A shard's status, (STATUS,) float32; a view."""
    return shard.narrow(0, shards.length - shards.status, shards.status).view(torch.float32)


def unpack(buffer: Tensor, shards: Shards) -> tuple[dict[str, list[tuple[int, Tensor]]], Tensor]:
    """({stack: [(first row, rows)]}, views in order; all ranks' statuses, (ranks, STATUS))."""
    parts = iter(torch.split(buffer, shards.split_sizes()))
    found: dict[str, list[tuple[int, Tensor]]] = {stack: [] for stack in shards.blocks}
    statuses = []
    for rank in range(len(shards.used)):
        for stack, piece in shards.owned_by(rank).items():
            rows = next(parts).view(piece.rows, *shards.blocks[stack].block)
            found[stack].append((piece.first, rows))
        next(parts)  # the padding
        statuses.append(next(parts).view(torch.float32))
    ordered = {stack: sorted(rows, key=lambda pair: pair[0]) for stack, rows in found.items()}
    return ordered, torch.stack(statuses)
