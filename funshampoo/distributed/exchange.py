"""The collective of one step: what each rank puts in, and what it hears of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.combinators.guard import failure_report
from funshampoo.distributed.collectives import ProcessGroup, all_gather_into
from funshampoo.distributed.shards import Shards, places_in_shard, status_of, unpack


class Exchange:
    """One step of one rank: compute, gather, and tell the others if that failed.

    Args:
        memory: {key: (shard, buffer)} of earlier steps, used again.
    """

    def __init__(
        self,
        shards: Shards,
        rank: int,
        group: ProcessGroup | None,
        key: tuple[torch.device, torch.dtype, int],
        memory: dict[Any, tuple[Tensor, Tensor]],
    ) -> None:
        self.shards, self.rank, self.group = shards, rank, group
        device, dtype, length = key
        if key not in memory:
            shard = torch.zeros(shards.length, dtype=dtype, device=device)
            memory[key] = shard, torch.empty(length, dtype=dtype, device=device)
        self.shard, self.buffer = memory[key]
        self.places = places_in_shard(self.shard, shards, rank)

    def run(
        self, step: Callable[[Put], Any], due: bool, look: bool
    ) -> tuple[dict[str, Any], Any, Tensor | None]:
        """(updates of all ranks: {stack: [(first row, updates)]}, state of this one, report).

        Args:
            due: whether the failures of this step are to be reported.
            look: whether to raise what other ranks have to say.
        """
        shards, failure, new = self.shards, None, None
        status = status_of(self.shard, shards)
        status.zero_()
        status[5] = shards.fingerprint
        try:
            new = step(self.put)
            if due:
                status[1:5] = failure_report(new, self.shard.device)
        except Exception as error:  # whatever it is: the others are waiting in the collective
            failure = error
            self.shard[: shards.length - shards.status].zero_()
            status[0] = 1.0
        all_gather_into(self.buffer, self.shard, self.group)
        if failure is not None:
            raise failure
        pieces, statuses = unpack(self.buffer, shards)
        if look:
            self._check(statuses)
        if not due:
            return pieces, new, None
        totals, longest = statuses[:, (1, 3)].sum(0), statuses[:, (2, 4)].amax(0)
        return pieces, new, torch.stack([totals, longest], dim=1).flatten()

    def put(self, stack: str, rows: range, updates: Tensor | None) -> None:
        """Copy updates to their place in the shard, cast to its dtype; None is zeros."""
        place = self.places[stack]
        if updates is None:
            place.zero_()
            return
        if updates.requires_grad:
            raise RuntimeError(
                "sharded: the updates require gradients, which end at the collective. Detach the "
                "gradients and the parameters that you pass to update, or differentiate through an "
                "optimizer that is not sharded."
            )
        if len(rows) < len(place):
            first = self.shards.owned_by(self.rank)[stack].first
            place = place.narrow(0, rows.start - first, len(rows))
        place.copy_(updates.view(place.shape))

    def _check(self, statuses: Tensor) -> None:
        """Raise what another rank has to say. Waits for the device."""
        failed, *_, fingerprints = statuses.T.tolist()
        if any(failed):
            raise RuntimeError(
                f"sharded: the optimizer step failed on rank {failed.index(1.0)} of {len(failed)}; "
                "its own error says why. None of its updates has been applied."
            )
        if set(fingerprints) != {self.shards.fingerprint}:
            raise RuntimeError(
                "sharded: the ranks do not agree on who owns which block. Give all of them the "
                "same parameters in the same order, and the same every, cost, max_size and merge."
            )
