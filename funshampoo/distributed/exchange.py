"""One step of a rank among others: what it computes, sends and receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from funshampoo.blocks.executor import Put
from funshampoo.combinators.failures import failure_report
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.distributed.collectives import LostRanksError
from funshampoo.distributed.disagreement import RankStatus
from funshampoo.distributed.shards import FAILED, INTERRUPTED
from funshampoo.operators.leaf_ops import per_block
from funshampoo.state.nodes import first_state
from funshampoo.state.stages import GuardedState


class Transport:
    """How the numbers of a step get from rank to rank.

    Attributes:
        places: {stack: where its updates go, (rows, *block)}.
        sent: all updates, and any padding between them; flat.
        status: (STATUS,) float32, sent with them.
    """

    places: dict[str, Tensor]
    sent: Tensor
    status: Tensor

    def gather(self) -> None:
        """Fetch the gradients of this rank's rows, if they are elsewhere."""

    def exchange_updates(self) -> Tensor:
        """The collective that ends the step; returns the statuses of all ranks, (ranks, STATUS)."""
        raise NotImplementedError

    def repeater(self) -> Callable[[float], Tensor]:
        """For `PreviousStep`: enters these collectives without updates, and keeps none."""
        raise NotImplementedError

    def exchange(
        self, step: Callable[[Put], Any], due: bool, rank_status: RankStatus
    ) -> tuple[Any, Tensor]:
        """Compute, meet the other ranks, and tell them if the step failed.

        Args:
            step: called with `put`.
            due: whether the failures of this step are to be reported.
            rank_status: what must be the same on all ranks.

        Returns:
            The state of this rank, and the statuses of all.
        """
        new, failure, status = None, None, self.status
        try:
            status.zero_()
            status[5], status[6] = rank_status.fingerprint, rank_status.number % 2**24
            status[7] = rank_status.content
            self.gather()
            new = step(self.put)
            if due:
                status[1:5] = failure_report(new, status.device)
        except LostRanksError:
            raise  # raised by the next collective as well
        except BaseException as error:  # Ctrl-C too: the others are waiting in the collective
            failure = error
            self.sent.zero_()
            status[0] = FAILED if isinstance(error, Exception) else INTERRUPTED
        try:
            statuses = self.exchange_updates()
        finally:
            if failure is not None:  # more specific than any error of the collective
                raise failure
        return new, statuses

    def put(self, stack: str, rows: range, updates: Tensor | None) -> None:
        """Copy updates to their place, cast to its dtype; None means zeros.

        Args:
            rows: among this rank's, from 0.
        """
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
            place = place.narrow(0, rows.start, len(rows))
        place.copy_(updates.view(place.shape))


Step = Callable[[Any, Put], Any]


def zeroing_nonfinite(step: Step, sent: Tensor, places: Mapping[str, Tensor]) -> Step:
    """The step, after which no sent block contains a non-finite number.

    A block with a number that overflowed in the communication dtype, or is NaN, becomes zeros. The
    outermost `guarded` of the state counts it like a non-finite gradient. The block's averages
    include this step. On other devices than a CPU nothing waits for the result.

    Args:
        sent: what this rank sends, padding included.
        places: {stack: (rows, *block)}, views of it.
    """

    def zeroed(state: Any, put: Put) -> Any:
        before = _streaks(state)
        new = step(state, put)
        # A sum is finite only if all its terms are. If it overflows by itself, all are checked.
        if sent.device.type == "cpu" and bool(sent.sum().isfinite()):
            return new
        dead = {}
        for stack, place in places.items():
            if place.numel():
                dead[stack] = ~place.reshape(len(place), -1).abs().amax(1).isfinite()
                place.masked_fill_(per_block(dead[stack], place), 0.0)
        return _counted(new, dead, before)

    return zeroed


def _streaks(state: Any) -> list[Tensor]:
    """Copies of the guard's streaks, since a step may write to them."""
    guard = first_state(state, GuardedState)
    return [] if guard is None else [x.clone() for x in flatten(guard.streak)[0]]


def _counted(state: Any, dead: Mapping[str, Tensor], before: list[Tensor]) -> Any:
    """Count these blocks as held, and continue their streaks, which the guard has ended."""
    guard = first_state(state, GuardedState)
    if guard is None:
        return state
    names = leaf_names(guard.held)
    held, spec = flatten(guard.held)
    streak = flatten(guard.streak)[0]
    for i, name in enumerate(names):
        if name in dead:
            mask = dead[name].view(held[i].shape)
            held[i] = held[i] + mask
            streak[i] = torch.where(mask, before[i] + 1, streak[i])
    counted = guard._replace(held=spec.unflatten(held), streak=spec.unflatten(streak))

    def is_guard(node: Any) -> bool:
        return node is guard

    return optree.tree_map(
        lambda node: counted if is_guard(node) else node, state, is_leaf=is_guard, none_is_leaf=True
    )
