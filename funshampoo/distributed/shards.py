"""The layout of the gathered buffer: where every rank's blocks and status are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from funshampoo.blocks.layout import Stack

STATUS = 8
"""float32 numbers at the end of each shard: FAILED, INTERRUPTED, CHANGED or 0, the four of the
failure report, a fingerprint of what all ranks have in common, the step number, and on a run's
first step a number made from the bits of the rank's data. There are eight, so that they are a whole
number of float64."""

FAILED, INTERRUPTED, CHANGED = 1.0, 2.0, 3.0


class Blocks(NamedTuple):
    """All blocks to be sharded.

    Attributes:
        stacks: in block space the stacks; else the leaves, each as a stack of one row.
        device: of all of them.
        dtype: wide enough for every update.
        in_blocks: whether they are stacks.
    """

    stacks: dict[str, Stack]
    device: torch.device
    dtype: torch.dtype
    in_blocks: bool

    @classmethod
    def of(cls, stacks: dict[str, Stack], in_blocks: bool = True) -> Blocks:
        """The blocks of these stacks, all on one device.

        Raises:
            ValueError: there are several devices.
        """
        devices = {stack.device for stack in stacks.values()} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(
                "sharded: the parameters are on several devices; one buffer can't hold them. Use "
                "one sharded(...) a device, by partition(...)."
            )
        wide = any(stack.dtype == torch.float64 for stack in stacks.values())
        return cls(stacks, devices.pop(), torch.float64 if wide else torch.float32, in_blocks)

    def described(self, own: Mapping[str, range]) -> dict[str, dict[str, tuple[()]]]:
        """`ShardedState.owned` of a rank that owns these."""
        if self.in_blocks:
            return {s: {f"{rows.start}:{rows.stop}": ()} for s, rows in own.items()}
        return {name: {"owned" if name in own else "elsewhere": ()} for name in self.stacks}


class OwnedRows(NamedTuple):
    """Consecutive rows of one stack with the same owner."""

    stack: str
    first: int
    rows: int
    owner: int

    @property
    def all_rows(self) -> range:
        """Their indices in the full stack."""
        return range(self.first, self.first + self.rows)


class Shards(NamedTuple):
    """The buffer: one shard per rank, all of `length` elements, each with its pieces and a status.

    Attributes:
        pieces: by owner, and for each owner in the order of the stacks.
        length: elements of a shard, status included.
        status: elements of the buffer's dtype that hold STATUS float32 numbers.
    """

    stacks: dict[str, Stack]
    pieces: tuple[OwnedRows, ...]
    length: int
    status: int

    def owned_by(self, rank: int) -> dict[str, range]:
        """{stack: this rank's rows}, without stacks of which it owns none."""
        return {piece.stack: piece.all_rows for piece in self.pieces if piece.owner == rank}


def shards_of(
    stacks: dict[str, Stack],
    owners: Mapping[str, Sequence[int]],
    world_size: int,
    dtype: torch.dtype,
) -> Shards:
    """The shards, where `owners` gives the owner of every row."""
    pieces = []
    for stack, ranks in owners.items():
        first = 0
        for owner, run in itertools.groupby(ranks):
            rows = len(list(run))
            pieces.append(OwnedRows(stack, first, rows, owner))
            first += rows
    pieces.sort(key=lambda piece: piece.owner)  # stable: within an owner by stack
    used = [0] * world_size
    for piece in pieces:
        used[piece.owner] += piece.rows * math.prod(stacks[piece.stack].block)
    status = STATUS * 4 // dtype.itemsize
    # Shards start at multiples of eight bytes, so that the status can be viewed as another dtype.
    length = -(-max(used) // 4) * 4 + status
    return Shards(stacks, tuple(pieces), length, status)
