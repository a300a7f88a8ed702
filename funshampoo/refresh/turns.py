"""Whose turn it is to be refreshed, where refreshes are spread over the interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from funshampoo.core.contract import Tree
from funshampoo.core.tree import MaskedNode, flatten, map_leaves

_GOLDEN = (5**0.5 - 1) / 2


class RefreshSchedule(NamedTuple):
    """The arguments of `root_inverse` that say when."""

    every: int
    start: int
    stagger: bool
    delay: int


class Refreshes(NamedTuple):
    """What happens to the roots on a step: trees of `Turn`s, or None for nobody.

    Attributes:
        now: are computed and used.
        asked: the factors are set aside; their roots come into use `delay` steps later.
        used: the roots of what was set aside `delay` steps before.
    """

    now: Tree = None
    asked: Tree = None
    used: Tree = None


class Turn(NamedTuple):
    """Which blocks of a stack are refreshed.

    Attributes:
        any: whether there is one at all.
        which: the rows; None for all.
    """

    any: bool
    which: tuple[int, ...] | None


EVERYBODY = Turn(True, None)


def phase(number: int, every: int) -> int:
    """At which step of the interval, 0..every-1, block `number` has its turn.

    Multiples of the golden ratio fill the interval evenly, and so do those of any run of numbers
    and of every n-th number: whatever blocks a rank owns, each step gets its share of them.

    >>> [phase(number, 5) for number in range(10)]
    [0, 3, 1, 4, 2, 0, 3, 1, 4, 2]
    """
    return int(every * (number * _GOLDEN % 1.0))


def happens_at(step: int, schedule: RefreshSchedule) -> tuple[bool, bool, bool]:
    """The fields of `Refreshes`, whether it may be somebody's turn: `now`, `asked`, `used`."""
    every, start, stagger, delay = schedule

    def due(t: int) -> bool:
        return t > start and (stagger or t % every == 0)

    if not delay or step <= start:
        return step == start or due(step), False, False
    return False, due(step), due(step - delay)


def refreshes_at(
    step: int,
    schedule: RefreshSchedule,
    updates: Tree,
    block_ids: Mapping[str, Sequence[int]] | None,
) -> Refreshes:
    """Who is refreshed at this step, and how."""

    def turns(t: int) -> Tree:
        if schedule.stagger and t > schedule.start:
            return turns_at(t, schedule.every, updates, block_ids)
        return everybody(updates)

    at = (step, step, step - schedule.delay)
    happens = happens_at(step, schedule)
    return Refreshes(*[turns(t) if happening else None for t, happening in zip(at, happens)])


def everybody(updates: Tree) -> Tree:
    """All of every leaf."""
    return map_leaves(lambda u: EVERYBODY, updates)


def turns_at(
    step: int, every: int, updates: Tree, block_ids: Mapping[str, Sequence[int]] | None
) -> Tree:
    """A tree of `Turn`s: who is refreshed at this step.

    Args:
        updates: stacks, or a tree outside block space, whose leaves are numbered in order.
        block_ids: {stack: a number for every row}, in block space.
    """
    now = step % every
    if block_ids is not None:
        turns = {
            stack: _turn([i for i, n in enumerate(ids) if phase(n, every) == now], len(ids))
            for stack, ids in block_ids.items()
        }
        hidden = [stack for stack, u in updates.items() if isinstance(u, MaskedNode)]
        return {stack: turns[stack] for stack in updates} | dict.fromkeys(hidden, MaskedNode())
    leaves, spec = flatten(updates)
    return spec.unflatten([Turn(phase(n, every) == now, None) for n in range(len(leaves))])


def _turn(rows: list[int], blocks: int) -> Turn:
    return EVERYBODY if len(rows) == blocks else Turn(bool(rows), tuple(rows))
