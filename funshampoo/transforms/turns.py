"""Whose turn it is to be refreshed, where refreshes are spread over the interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.base import Tree
from funshampoo.tree import MaskedNode, flatten

_GOLDEN = (5**0.5 - 1) / 2


class Turn(NamedTuple):
    """Which blocks of a stack are refreshed: all of them, or these rows."""

    all: bool
    rows: tuple[int, ...]

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return self.all or bool(self.rows)

    def rows_on(self, like: Tensor) -> Tensor | None:
        """The rows on the device of `like`; None for all."""
        return None if self.all else torch.tensor(self.rows, device=like.device)


EVERYBODY = Turn(True, ())


def phase(number: int, every: int) -> int:
    """At which step of the interval, 0..every-1, block `number` has its turn.

    Multiples of the golden ratio fill the interval evenly, and so do those of any run of numbers
    and of every n-th number: whatever blocks a rank owns, each step gets its share of them.

    >>> [phase(number, 5) for number in range(10)]
    [0, 3, 1, 4, 2, 0, 3, 1, 4, 2]
    """
    return int(every * (number * _GOLDEN % 1.0))


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
    return spec.unflatten([Turn(phase(n, every) == now, ()) for n in range(len(leaves))])


def _turn(rows: list[int], blocks: int) -> Turn:
    return EVERYBODY if len(rows) == blocks else Turn(False, tuple(rows))
