"""The transport of whole parameters: the updates of all ranks to all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.distributed.collectives import ProcessGroup, all_gather_into
from funshampoo.distributed.exchange import Transport
from funshampoo.distributed.shards import Shards

Memory = dict[Any, tuple[Tensor, Tensor]]
Key = tuple[torch.device, torch.dtype, int]


class AllGather(Transport):
    """One all_gather_into_tensor of the updates.

    Args:
        key: device, dtype and length of the gathered buffer.
        memory: {key: (shard, buffer)} of earlier donated steps, reused.

    Attributes:
        pieces: after `exchange_updates`, the updates of all ranks: [(stack, rows of it, updates)],
            views; for each stack in row order, since the owners ascend.
    """

    def __init__(
        self, shards: Shards, rank: int, group: ProcessGroup | None, key: Key, memory: Memory
    ) -> None:
        self._shards, self._group, self._key = shards, group, key
        if key not in memory:
            if len(memory) > 3:  # groups were edited, and buffers are large
                memory.clear()
            memory[key] = _buffers(shards, key)
        self._shard, self._buffer = memory[key]
        self.rows = shards.owned_by(rank)
        self.places = _places(self._shard, shards, rank)
        self.sent = self._shard[: shards.length - shards.status]
        self.status = _status(self._shard, shards)
        self.pieces: list[tuple[str, range, Tensor]] = []

    def exchange_updates(self) -> Tensor:
        """See `Transport`."""
        shards = self._shards
        all_gather_into(self._buffer, self._shard, self._group)
        for rank, shard in enumerate(self._buffer.split(shards.length)):
            own = shards.owned_by(rank)
            for stack, x in _places(shard, shards, rank).items():
                self.pieces.append((stack, own[stack], x))
        return _statuses(self._buffer, shards)

    def repeater(self) -> Callable[[float], Tensor]:
        """See `Transport`."""
        shards, key, group = self._shards, self._key, self._group

        def repeat(word: float) -> Tensor:
            shard, buffer = _buffers(shards, key)
            _status(shard, shards)[0] = word
            all_gather_into(buffer, shard, group)
            return _statuses(buffer, shards)

        return repeat


def _buffers(shards: Shards, key: Key) -> tuple[Tensor, Tensor]:
    device, dtype, length = key
    shard = torch.zeros(shards.length, dtype=dtype, device=device)
    return shard, torch.empty(length, dtype=dtype, device=device)


def _places(shard: Tensor, shards: Shards, rank: int) -> dict[str, Tensor]:
    """Where a rank's rows are in its shard, (length,): views (rows, *block)."""
    own = shards.owned_by(rank)
    shapes = {s: (len(rows), *shards.stacks[s].block) for s, rows in own.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = torch.split(shard, [*sizes, shards.length - sum(sizes)])
    return {s: x.view(shape) for (s, shape), x in zip(shapes.items(), parts)}


def _status(shard: Tensor, shards: Shards) -> Tensor:
    """A shard's status, (STATUS,) float32; a view."""
    return shard.narrow(0, shards.length - shards.status, shards.status).view(torch.float32)


def _statuses(buffer: Tensor, shards: Shards) -> Tensor:
    """All ranks' statuses, (ranks, STATUS)."""
    return torch.stack([_status(shard, shards) for shard in buffer.split(shards.length)])
