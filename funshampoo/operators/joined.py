"""Small tensors of many leaves concatenated, one per kind, to save launches on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Tree
from funshampoo.core.modes import is_traced
from funshampoo.core.tree import columns_of, flatten
from funshampoo.operators.by_number import FEW


class Joined:
    """The layout of a tree's tensors, one per leaf, in a dict with one tensor per kind.

    Args:
        like: a tree of tensors, such as norms () or (N,), or None: such a leaf is in no dict.
        others: further trees to be joined. Leaves whose dtypes or devices differ in one of them are
            of different kinds.
    """

    def __init__(self, like: Tree, *others: Tree) -> None:
        self._leaves, self._spec = flatten(like)
        columns = [self._leaves, *columns_of(others, self._spec, like)]
        kinds: dict[Any, list[int]] = {}
        for i, row in enumerate(zip(*columns)):
            if row[0] is not None:
                kinds.setdefault(tuple([(x.dtype, x.device) for x in row]), []).append(i)
        self._kinds = {str(n): places for n, places in enumerate(kinds.values())}

    def worth_it(self) -> bool:
        """Whether it saves launches: plain tensors off the CPU, more than a few, untraced."""
        found = [x for x in self._leaves if x is not None]
        own = [type(x) is Tensor and not x.is_cpu for x in found]  # a DTensor is stepped alone
        return len(found) > FEW and not is_traced() and all(own)

    def join(self, tree: Tree) -> dict[str, Tensor]:
        """{kind: the leaves of a tree like this one, flat, concatenated}. New tensors."""
        leaves = columns_of([tree], self._spec, tree)[0]
        return {
            kind: torch.cat([leaves[i].reshape(-1) for i in places])
            for kind, places in self._kinds.items()
        }

    def split(self, joined: dict[str, Tensor], others: Tree = None) -> Tree:
        """The tree that was joined, as views; where it has no leaf, the other tree's or None."""
        found: list[Any] = [None] * len(self._leaves)
        if others is not None:
            found = list(columns_of([others], self._spec, others)[0])
        for kind, places in self._kinds.items():
            shapes = [self._leaves[i].shape for i in places]
            parts = torch.split(joined[kind], [shape.numel() for shape in shapes])
            for i, part, shape in zip(places, parts, shapes):
                found[i] = part.reshape(shape)
        return self._spec.unflatten(found)

    def write(self, joined: dict[str, Tensor], tree: Tree) -> Tree:
        """The same, copied into the memory of the tree's own leaves."""
        old = columns_of([tree], self._spec, tree)[0]
        new: list[Any] = columns_of([self.split(joined)], self._spec, tree)[0]
        pairs = [(x, y) for x, y in zip(old, new) if y is not None]
        torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])
        return tree
