"""Who sends what: the places of all blocks in one gathered buffer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from funshampoo.blocks.layout import Stack

STATUS = 8
"""Numbers of float32 at the end of each shard: FAILED, INTERRUPTED, CHANGED or 0, the
four of the failure report, a fingerprint of what all ranks have in common, the number of the step,
and on a run's first step a sum of the bits that the rank has for it; they are eight, so that the
length is whole in float64."""

FAILED, INTERRUPTED, CHANGED = 1.0, 2.0, 3.0


class Blocks(NamedTuple):
    """All blocks that are shared out.

    Attributes:
        stacks: in block space the stacks; else the leaves, each a stack of one row.
        device: of all.
        dtype: in which every update fits.
        in_blocks: whether they are stacks.
    """

    stacks: dict[str, Stack]
    device: torch.device
    dtype: torch.dtype
    in_blocks: bool

    @classmethod
    def of(cls, stacks: dict[str, Stack], in_blocks: bool = True) -> Blocks:
        """Those of one device.

        Raises:
            ValueError: there are several.
        """
        devices = {stack.device for stack in stacks.values()} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(
                "sharded: the parameters are on several devices; one buffer can't hold them. Use "
                "one sharded(...) a device, by partition(...)."
            )
        wide = any(stack.dtype == torch.float64 for stack in stacks.values())
        return cls(stacks, devices.pop(), torch.float64 if wide else torch.float32, in_blocks)

    def described(self, own: Mapping[str, Piece]) -> dict[str, dict[str, tuple[()]]]:
        """`ShardedState.owned` of a rank that owns these."""
        if self.in_blocks:
            return {s: {f"{p.first}:{p.first + p.rows}": ()} for s, p in own.items()}
        return {name: {"owned" if name in own else "elsewhere": ()} for name in self.stacks}


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
        length: elements of a shard, status included.
        status: elements of the buffer's dtype that hold STATUS numbers of float32.
    """

    stacks: dict[str, Stack]
    pieces: tuple[Piece, ...]
    length: int
    status: int

    def owned_by(self, rank: int) -> dict[str, Piece]:
        """{stack: the rows of this rank}, without the stacks of which it has none."""
        return {piece.stack: piece for piece in self.pieces if piece.owner == rank}


def shards_of(
    stacks: dict[str, Stack],
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
    used = [0] * world_size
    for piece in pieces:
        used[piece.owner] += piece.rows * math.prod(stacks[piece.stack].block)
    status = STATUS * 4 // dtype.itemsize
    # A shard starts where eight bytes do, so that the status can be read as another dtype.
    length = -(-max(used) // 4) * 4 + status
    return Shards(stacks, tuple(pieces), length, status)
