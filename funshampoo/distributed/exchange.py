"""One step of one rank among others: what it tells them, and what it hears of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.combinators.failures import failure_report
from funshampoo.distributed.agreement import print_of
from funshampoo.distributed.changes import Form, Says, check
from funshampoo.distributed.collectives import LostRanksError, ProcessGroup
from funshampoo.distributed.shards import FAILED, INTERRUPTED

_NOTHING = Says()


class Transport(Protocol):
    """How the numbers of a step get from rank to rank.

    Attributes:
        places: {stack: where the updates of its rows of this rank go, (rows, *block)}.
        sent: all of them, and what may be between them; flat.
        status: (STATUS,) float32, which travels with them.
    """

    places: dict[str, Tensor]
    sent: Tensor
    status: Tensor

    def gather(self) -> None:
        """Bring the gradients of the rows of this rank, where they are elsewhere."""

    def meet(self) -> Tensor:
        """The collective that ends the step: the statuses of all ranks, (ranks, STATUS)."""

    def form(self) -> Form:
        """These collectives, to be met once more without the numbers."""


class Exchange:
    """One step of one rank: compute, meet the others, and tell them if that failed.

    Args:
        transport: of this step.
        rows: {stack: the rows of this rank}, as the step calls them.
    """

    def __init__(
        self, transport: Transport, rows: Mapping[str, range], group: ProcessGroup | None
    ) -> None:
        self.transport, self.rows, self.group = transport, rows, group
        self._contents = torch.empty(0)

    def run_number(self) -> int:
        """A number for a run, after its first step: the same on all ranks. Waits for the device."""
        return print_of(self._contents.tolist(), 40) | 1

    def run(
        self, step: Callable[[Put], Any], due: bool, look: bool, says: Says = _NOTHING
    ) -> tuple[Any, Tensor | None]:
        """(the state of this rank, the report of all).

        Args:
            due: whether the failures of this step are to be reported.
            look: whether to raise what other ranks have to say. Waits for the device.
            says: what has to be the same on all ranks.

        Raises:
            RuntimeError: if it looks, another rank failed, or does something else.
        """
        transport, new = self.transport, None
        failure: BaseException | None = None
        status = transport.status
        try:
            status.zero_()
            status[5], status[6] = says.fingerprint, says.number % 2**24
            status[7] = says.content
            transport.gather()
            new = step(self.put)
            if due:
                status[1:5] = failure_report(new, status.device)
        except LostRanksError:
            raise  # from the next collective as well
        except BaseException as error:  # Ctrl-C too: the others are waiting in the collective
            failure = error
            transport.sent.zero_()
            status[0] = FAILED if isinstance(error, Exception) else INTERRUPTED
        try:
            statuses = transport.meet()
        finally:
            if failure is not None:  # more to the point than what the collective may say
                raise failure
        self._contents = statuses[:, 7]
        if look:
            check(statuses.tolist(), says, self.group)
        if not due:
            return new, None
        totals, longest = statuses[:, (1, 3)].sum(0), statuses[:, (2, 4)].amax(0)
        return new, torch.stack([totals, longest], dim=1).flatten()

    def put(self, stack: str, rows: range, updates: Tensor | None) -> None:
        """Copy updates to their place, cast to its dtype; None is zeros."""
        place = self.transport.places[stack]
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
            place = place.narrow(0, rows.start - self.rows[stack].start, len(rows))
        place.copy_(updates.view(place.shape))
