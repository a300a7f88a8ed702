"""The ranks' reports on their steps, and the error if they disagree.

The error says what differs, on which rank, and the remedy.

When a rank's parameters or chain have changed, the other ranks may not know. It needs collectives
that only it would enter: to agree again, and to gather the state of what moved. The others are in
those of a step like the last one. So it first takes part in that step once more, contributing
nothing but the word CHANGED in its status:

- if all ranks say so, as after an edit that all of them made, each continues with its change;
- if only some do, all of them see it in the same collective, and gather the text for the message.

A step in which nothing has changed sends what it always sends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from funshampoo.distributed.collectives import ProcessGroup, gathered_objects
from funshampoo.distributed.described import Line
from funshampoo.distributed.shards import CHANGED, FAILED, INTERRUPTED

_REMEDY = (
    "Give all of them the same parameters in the same order, as DistributedDataParallel has them, "
    "the same hyperparameters, and zeros where others have a gradient. This step moved no "
    "parameter; after the first one, a donated state is spent: go on from a checkpoint."
)


class RankStatus(NamedTuple):
    """A rank's report on its step, to be compared with the others'.

    Attributes:
        fingerprint: below 2^24, which float32 holds exactly.
        number: of the step; 0 if not known.
        content: on a run's first step, a number below 2^24 made from the bits of this rank's data.
        lines: what the fingerprint is computed from.
        description: what is stepped, in case the ranks do not step the same.
    """

    fingerprint: int = 0
    number: int = 0
    content: int = 0
    lines: Callable[[], list[Line]] = list
    description: Callable[[], list[Line]] = list


class PreviousStep(NamedTuple):
    """The previous step.

    Attributes:
        repeat: enters its collectives again, with this word as the status and no updates; returns
            the statuses of all ranks, (ranks, STATUS).
        every: the ranks read the statuses on multiples of this; 1: always.
    """

    repeat: Callable[[float], Tensor]
    every: int


def announce_change(
    steps: Sequence[PreviousStep], description: Callable[[], list[Line]], group: ProcessGroup | None
) -> None:
    """Tell all ranks that this one is about to step something else. Returns if all are.

    Args:
        steps: those of all `sharded` parts of one step, in order. On a device the other ranks do
            not read every status; until they do, this rank repeats the steps with them.
        description: what this rank is about to step.

    Raises:
        RuntimeError: some ranks repeat a step like the last one; on every rank.
    """
    for step in itertools.cycle(steps):
        rows = step.repeat(CHANGED).tolist()
        going_on = [int(row[6]) for row in rows if row[0] != CHANGED]
        if not going_on:
            return
        if going_on[0] % step.every == 0:
            check_statuses(rows, RankStatus(description=description), group)


def check_statuses(
    rows: Sequence[Sequence[float]], rank_status: RankStatus, group: ProcessGroup | None
) -> None:
    """Raise any error that the statuses of all ranks call for.

    Raises:
        RuntimeError: a rank failed, or does something else.
    """
    what, *_, prints, numbers, _ = zip(*rows)
    for rank, word in enumerate(what):
        if word in (FAILED, INTERRUPTED):
            happened = "was interrupted" if word == INTERRUPTED else "failed"
            raise RuntimeError(
                f"sharded: the optimizer step {happened} on rank {rank} of {len(what)}; its "
                "own error says why. None of its updates has been applied. A donated state is "
                "spent: go on from a checkpoint."
            )
    if CHANGED in what:  # every rank reads this status, so all enter the collective
        why = (
            f": rank {what.index(CHANGED)} was given other parameters, gradients of another dtype "
            f"or another chain than at the step before, and rank {what.index(0.0)} was not"
        )
        raise disagreement_error(rank_status.description(), group, otherwise=why)
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            raise RuntimeError(
                f"sharded: the ranks are at different steps, rank 0 at {numbers[0]:.0f} and "
                f"rank {rank} at {number:.0f}: give all of them a state of the same step, and "
                "the same step= if you pass one. None of this step's updates has been applied."
            )
    if len(set(prints)) > 1:  # the numbers are equal, so every rank sees this, and enters, too
        raise disagreement_error(rank_status.lines(), group)


class Bits(NamedTuple):
    """`bits_of`, one number per leaf: of the parameters ([] if there are none) and gradients."""

    value: list[int]
    gradient: list[int]


_NO_BITS = Bits([], [])


def disagreement_error(
    lines: list[Line],
    group: ProcessGroup | None,
    bits: Bits = _NO_BITS,
    names: Sequence[str] = (),
    otherwise: str = "",
) -> RuntimeError:
    """The error that says what differs, and on which rank. A collective.

    Args:
        otherwise: the message if the lines are the same.
    """
    found = gathered_objects((lines, bits, list(names)), group)
    (first, orders, ours), others = found[0], found[1:]
    for rank, (theirs, its_orders, _) in enumerate(others, start=1):
        if theirs != first:
            return RuntimeError(difference(first, theirs, rank))
        for what, order, other in zip(Bits._fields, orders, its_orders):
            if other != order and sorted(other) == sorted(order):
                i = next(i for i, (a, b) in enumerate(zip(order, other)) if a != b)
                j = other.index(order[i])
                return RuntimeError(
                    "sharded: the ranks do not agree on the order of the parameters: by its "
                    f"{what}, '{ours[i]}' of rank 0 is '{ours[j]}' of rank {rank}. {_REMEDY}"
                )
    return RuntimeError(f"sharded: the ranks do not agree{otherwise}. {_REMEDY}")


def difference(first: list[Line], other: list[Line], rank: int) -> str:
    """The first difference between rank 0 and another rank, in words, and the remedy."""
    differs = first_difference(first, other, rank)
    return f"sharded: the ranks do not agree: {differs}. {_REMEDY}"


def first_difference(first: list[Line], other: list[Line], rank: int) -> str:
    """The same without the remedy."""
    pairs = zip([*first, ("", "nothing more")], [*other, ("", "nothing more")])
    (label, ours), (their_label, theirs) = next((a, b) for a, b in pairs if a != b)
    if label == their_label:
        return f"{label} is {ours} on rank 0, {theirs} on rank {rank}"
    return f"rank 0 has {label}: {ours}; rank {rank} {their_label}: {theirs}"
