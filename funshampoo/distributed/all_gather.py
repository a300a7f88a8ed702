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
        self._arguments = shards, rank, group, key
        if key not in memory:
            if len(memory) > 3:  # groups were edited, and buffers are large
                memory.clear()
            device, dtype, length = key
            shard = torch.zeros(shards.length, dtype=dtype, device=device)
            memory[key] = shard, torch.empty(length, dtype=dtype, device=device)
        self._shard, self._buffer = memory[key]
        self.places = _places(self._shard, shards, rank)
        self.sent = self._shard[: shards.length - shards.status]
        self.status = _status(self._shard, shards)
        self.pieces: list[tuple[str, range, Tensor]] = []

    def exchange_updates(self) -> Tensor:
        """See `Transport`."""
        shards, _, group, _ = self._arguments
        all_gather_into(self._buffer, self._shard, group)
        of_ranks = self._buffer.split(shards.length)
        for rank, shard in enumerate(of_ranks):
            own = shards.owned_by(rank)
            for stack, x in _places(shard, shards, rank).items():
                self.pieces.append((stack, own[stack], x))
        return torch.stack([_status(shard, shards) for shard in of_ranks])

    def repeater(self) -> Callable[[float], Tensor]:
        """See `Transport`."""
        arguments = self._arguments

        def repeat(word: float) -> Tensor:
            again = AllGather(*arguments, memory={})
            again.status[0] = word
            return again.exchange_updates()

        return repeat


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
