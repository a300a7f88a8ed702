"""One step of one rank among others: what it tells them, and what it hears of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.combinators.failures import failure_report
from funshampoo.distributed.collectives import LostRanksError
from funshampoo.distributed.disagreement import Says
from funshampoo.distributed.shards import FAILED, INTERRUPTED


class Transport:
    """How the numbers of a step get from rank to rank.

    Attributes:
        rows: {stack: the rows of this rank}, as the step calls them.
        places: {stack: where the updates of these go, (rows, *block)}.
        sent: all of them, and what may be between them; flat.
        status: (STATUS,) float32, which travels with them.
    """

    rows: Mapping[str, range]
    places: dict[str, Tensor]
    sent: Tensor
    status: Tensor

    def gather(self) -> None:
        """Bring the gradients of the rows of this rank, where they are elsewhere."""

    def meet(self) -> Tensor:
        """The collective that ends the step: the statuses of all ranks, (ranks, STATUS)."""
        raise NotImplementedError

    def once_more(self) -> Callable[[float], Tensor]:
        """What meets these collectives again without the numbers; of `Last`. Keeps no numbers."""
        raise NotImplementedError

    def exchange(self, step: Callable[[Put], Any], due: bool, says: Says) -> tuple[Any, Tensor]:
        """Compute, meet the others, and tell them if that failed.

        Args:
            step: of its argument, `put`.
            due: whether the failures of this step are to be reported.
            says: what has to be the same on all ranks.

        Returns:
            The state of this rank, and the statuses of all.
        """
        new, failure, status = None, None, self.status
        try:
            status.zero_()
            status[5], status[6] = says.fingerprint, says.number % 2**24
            status[7] = says.content
            self.gather()
            new = step(self.put)
            if due:
                status[1:5] = failure_report(new, status.device)
        except LostRanksError:
            raise  # from the next collective as well
        except BaseException as error:  # Ctrl-C too: the others are waiting in the collective
            failure = error
            self.sent.zero_()
            status[0] = FAILED if isinstance(error, Exception) else INTERRUPTED
        try:
            statuses = self.meet()
        finally:
            if failure is not None:  # more to the point than what the collective may say
                raise failure
        return new, statuses

    def put(self, stack: str, rows: range, updates: Tensor | None) -> None:
        """Copy updates to their place, cast to its dtype; None is zeros."""
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
            place = place.narrow(0, rows.start - self.rows[stack].start, len(rows))
        place.copy_(updates.view(place.shape))
