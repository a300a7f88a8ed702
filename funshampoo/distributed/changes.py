"""A rank whose parameters or chain have changed, among others that may not know of it.

It needs collectives that nobody else comes to: the ranks agree anew, and bring together the state
of what moved. The others are in those of a step as the one before. So before it does anything, it
takes part in that step once more, with nothing to add but the word CHANGED in its status:

- where all ranks say so, as after an edit that all of them made, each goes on to what is new;
- where only some do, all of them see it in the same collective, and together fetch the words for
  the message.

A step in which nobody changed anything sends what it always sends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from funshampoo.distributed.collectives import ProcessGroup
from funshampoo.distributed.described import Line
from funshampoo.distributed.disagreement import changed, disagreement
from funshampoo.distributed.shards import CHANGED, FAILED, INTERRUPTED


class Says(NamedTuple):
    """What a rank says of its step, to be compared with what the others do.

    Attributes:
        fingerprint: below 2^24, so that float32 holds it.
        number: of the step; 0 where it is not known.
        content: of a run's first step: below 2^24, of the bits that this rank has for it.
        lines: what the fingerprint is of.
        words: what is stepped, for ranks that do not step the same.
    """

    fingerprint: int = 0
    number: int = 0
    content: int = 0
    lines: Callable[[], list[Line]] = list
    words: Callable[[], list[Line]] = list


class Form(Protocol):
    """The collectives of a step, without its numbers."""

    def met(self, word: float) -> Tensor:
        """The statuses of all ranks, (ranks, STATUS), for one that only has this word to say."""


class Last(NamedTuple):
    """The step before.

    Attributes:
        every: on which multiples the ranks look at the statuses; 1: always.
    """

    form: Form
    every: int


def announce(
    steps: Sequence[Last], words: Callable[[], list[Line]], group: ProcessGroup | None
) -> None:
    """Tell all ranks that this one is about to step something else. Returns if all of them are.

    Args:
        steps: those of all `sharded` parts of one step, in their order. On a device others do not
            look at every status; until they do, this rank goes on with them.
        words: what this rank is about to step.

    Raises:
        RuntimeError: some ranks are in a step as the one before; on every rank.
    """
    for step in itertools.cycle(steps):
        rows = step.form.met(CHANGED).tolist()
        going_on = [int(row[6]) for row in rows if row[0] != CHANGED]
        if not going_on:
            return
        if going_on[0] % step.every == 0:
            check(rows, Says(words=words), group)


def check(rows: Sequence[Sequence[float]], says: Says, group: ProcessGroup | None) -> None:
    """Raise what the statuses of all ranks have to say.

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
    if CHANGED in what:  # every rank looks at this status, so that all of them come
        raise changed(says.words(), [word == CHANGED for word in what], group)
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            raise RuntimeError(
                f"sharded: the ranks are at different steps, rank 0 at {numbers[0]:.0f} and "
                f"rank {rank} at {number:.0f}: give all of them a state of the same step, and "
                "the same step= if you pass one. None of this step's updates has been applied."
            )
    if len(set(prints)) > 1:  # the numbers are equal, so that every rank looks, and comes
        raise disagreement(says.lines(), group)
