"""On which steps there are refreshes, and which blocks' turn it is if they are staggered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from funshampoo.core.checks import check_count, check_flag
from funshampoo.core.clock import refresh_due
from funshampoo.core.context import Context
from funshampoo.core.contract import REFRESH, THREADS, Phase, Tree
from funshampoo.core.tree import MaskedNode, flatten, map_leaves

_GOLDEN = (5**0.5 - 1) / 2

BlockIds = Mapping[str, Sequence[int]] | None
"""{stack: a number per row}, in block space."""


class Turn(NamedTuple):
    """Which blocks of a stack to refresh.

    Attributes:
        any: whether there are any.
        which: the rows; None for all.
    """

    any: bool
    which: tuple[int, ...] | None


EVERYBODY = Turn(True, None)


@dataclass(frozen=True)
class RefreshSchedule:
    """On which steps the kept values are recomputed.

    Args:
        every: steps between refreshes.
        start: the step of the first, for all blocks; later ones fall on multiples of `every`.
        stagger: spread them over the interval, a share of the blocks on every step, so that no step
            after `start` carries them all.
        offset: later refreshes fall on `offset` past multiples of `every`.

    Raises:
        ValueError, TypeError: an argument out of range; the error names it.
    """

    every: int = 10
    start: int = 1
    stagger: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("start", self.start)
        check_flag("stagger", self.stagger)
        check_count("offset", self.offset, least=0)

    def happens_at(self, step: int) -> bool:
        """Whether any block may have its turn."""
        spread = self.stagger and step > self.start
        return spread or refresh_due(step - self.offset, self.every, self.start - self.offset)

    def renews(self, context: Context) -> bool:
        """Whether any block may have its turn in this context; False if the step is unknown."""
        if context.refresh is not None:
            return context.refresh
        return context.step is not None and self.happens_at(context.step)

    def phase(self, threads: bool = False) -> Callable[[int], Phase]:
        """`GradientTransformation.phase` of a stage with this schedule.

        Args:
            threads: whether CPU threads share the work of a refresh.
        """
        label = THREADS if threads else REFRESH

        def phase(step: int) -> Phase:
            if not self.happens_at(step):
                return ()
            spread = self.stagger and step > self.start
            return (f"{label}, turn {step % self.every} of {self.every}" if spread else label,)

        return phase

    def turns_at(self, step: int, updates: Tree, block_ids: BlockIds) -> Tree:
        """A tree of `Turn`s for this step; None if no block has its turn.

        Args:
            step: the step number.
            updates: stacks, or a tree outside block space, whose leaves are numbered in order.
            block_ids: in block space.
        """
        if not self.happens_at(step):
            return None
        if not self.stagger or step <= self.start:
            return everybody(updates)
        every, now = self.every, step % self.every
        if block_ids is not None:
            turns = {
                stack: _turn([i for i, n in enumerate(ids) if phase(n, every) == now], len(ids))
                for stack, ids in block_ids.items()
            }
            hidden = [stack for stack, u in updates.items() if isinstance(u, MaskedNode)]
            return {stack: turns[stack] for stack in updates} | dict.fromkeys(hidden, MaskedNode())
        leaves, spec = flatten(updates)
        return spec.unflatten([Turn(phase(n, every) == now, None) for n in range(len(leaves))])


def phase(number: int, every: int) -> int:
    """The step of the interval, 0..every-1, at which block `number` has its turn.

    Multiples of the golden ratio fill the interval evenly, and so do those of any run of numbers
    and of every n-th number: whatever blocks a rank owns, every step gets a fair share of them.

    >>> [phase(number, 5) for number in range(10)]
    [0, 3, 1, 4, 2, 0, 3, 1, 4, 2]
    """
    return int(every * (number * _GOLDEN % 1.0))


def everybody(updates: Tree) -> Tree:
    """All rows of every leaf."""
    return map_leaves(lambda u: EVERYBODY, updates)


def _turn(rows: list[int], blocks: int) -> Turn:
    return EVERYBODY if len(rows) == blocks else Turn(bool(rows), tuple(rows))
