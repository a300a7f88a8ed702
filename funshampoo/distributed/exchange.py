"""The collective of one step: what each rank puts in, and what it hears of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.combinators.failures import failure_report
from funshampoo.distributed.agreement import disagreement
from funshampoo.distributed.collectives import ProcessGroup, all_gather_into
from funshampoo.distributed.described import Line
from funshampoo.distributed.shards import (
    FAILED,
    INTERRUPTED,
    Shards,
    places_in_shard,
    status_of,
    unpack,
)


class Says(NamedTuple):
    """What a rank says of its step, to be compared with what the others do.

    Attributes:
        fingerprint: below 2^24, so that float32 holds it.
        number: of the step; 0 where it is not known.
        lines: what the fingerprint is of.
    """

    fingerprint: int = 0
    number: int = 0
    lines: Callable[[], list[Line]] = list


_NOTHING = Says()


class Exchange:
    """One step of one rank: compute, gather, and tell the others if that failed.

    Args:
        memory: {key: (shard, buffer)} of earlier steps, used again.

    Attributes:
        sent: of the shard, all but the status.
        places: {stack: where its rows of this rank go}, views of the shard.
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
        self.sent = self.shard[: shards.length - shards.status]

    def run(
        self, step: Callable[[Put], Any], due: bool, look: bool, says: Says = _NOTHING
    ) -> tuple[dict[str, Any], Any, Tensor | None]:
        """(updates of all ranks: {stack: [(first row, updates)]}, state of this one, report).

        Args:
            due: whether the failures of this step are to be reported.
            look: whether to raise what other ranks have to say.
            says: what has to be the same on all ranks.

        Raises:
            RuntimeError: if it looks, another rank failed, or does something else.
        """
        shards, new = self.shards, None
        failure: BaseException | None = None
        status = status_of(self.shard, shards)
        try:
            status.zero_()
            status[5], status[6] = says.fingerprint, says.number % 2**24
            new = step(self.put)
            if due:
                status[1:5] = failure_report(new, self.shard.device)
        except BaseException as error:  # Ctrl-C too: the others are waiting in the collective
            failure = error
            self.sent.zero_()
            status[0] = FAILED if isinstance(error, Exception) else INTERRUPTED
        try:
            all_gather_into(self.buffer, self.shard, self.group)
        finally:
            if failure is not None:  # more to the point than what the collective may say
                raise failure
        pieces, statuses = unpack(self.buffer, shards)
        if look:
            self._check(statuses, says)
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

    def _check(self, statuses: Tensor, says: Says) -> None:
        """Raise what another rank has to say. Waits for the device."""
        failed, *_, prints, numbers, _ = statuses.T.tolist()
        for rank, what in enumerate(failed):
            if what:
                happened = "was interrupted" if what == INTERRUPTED else "failed"
                raise RuntimeError(
                    f"sharded: the optimizer step {happened} on rank {rank} of {len(failed)}; its "
                    "own error says why. None of its updates has been applied. A donated state is "
                    "spent: go on from a checkpoint."
                )
        for rank, number in enumerate(numbers):
            if number != numbers[0]:
                raise RuntimeError(
                    f"sharded: the ranks are at different steps, rank 0 at {numbers[0]:.0f} and "
                    f"rank {rank} at {number:.0f}: give all of them a state of the same step, and "
                    "the same step= if you pass one. None of this step's updates has been applied."
                )
        if len(set(prints)) > 1:  # the numbers are equal, so that every rank looks, and comes
            raise disagreement(says.lines(), self.group)
