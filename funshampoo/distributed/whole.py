"""The transport of whole parameters: every rank has all gradients, and gathers all updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.distributed.collectives import ProcessGroup, all_gather_into
from funshampoo.distributed.shards import Shards, places_in_shard, status_of, unpack

Memory = dict[Any, tuple[Tensor, Tensor]]
Key = tuple[torch.device, torch.dtype, int]


class WholeForm(NamedTuple):
    """The collective of a `Whole`; a `Form`."""

    shards: Shards
    key: Key
    group: ProcessGroup | None

    def met(self, word: float) -> Tensor:
        """See `Form`."""
        device, dtype, length = self.key
        shard = torch.zeros(self.shards.length, dtype=dtype, device=device)
        status_of(shard, self.shards)[0] = word
        buffer = torch.empty(length, dtype=dtype, device=device)
        all_gather_into(buffer, shard, self.group)
        return unpack(buffer, self.shards)[1]


class Whole:
    """One all_gather_into_tensor of the updates; a `Transport`.

    Args:
        key: device, dtype and length of the gathered buffer.
        memory: {key: (shard, buffer)} of earlier donated steps, used again.

    Attributes:
        pieces: after `meet`, the updates of all ranks: {stack: [(first row, updates)]}, views.
    """

    def __init__(
        self,
        shards: Shards,
        rank: int,
        group: ProcessGroup | None,
        key: Key,
        memory: Memory,
    ) -> None:
        self._shards, self._group, self._key = shards, group, key
        device, dtype, length = key
        if key not in memory:
            if len(memory) > 3:  # groups were edited, and buffers are large
                memory.clear()
            shard = torch.zeros(shards.length, dtype=dtype, device=device)
            memory[key] = shard, torch.empty(length, dtype=dtype, device=device)
        self._shard, self._buffer = memory[key]
        self.places = places_in_shard(self._shard, shards, rank)
        self.sent = self._shard[: shards.length - shards.status]
        self.status = status_of(self._shard, shards)
        self.pieces: dict[str, list[tuple[int, Tensor]]] = {}

    def gather(self) -> None:
        """Nothing: the gradients are here."""

    def meet(self) -> Tensor:
        """See `Transport`."""
        all_gather_into(self._buffer, self._shard, self._group)
        self.pieces, statuses = unpack(self._buffer, self._shards)
        return statuses

    def form(self) -> WholeForm:
        """See `Transport`."""
        return WholeForm(self._shards, self._key, self._group)
