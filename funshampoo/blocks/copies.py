"""Copying gradients in and updates out: the arguments of a step, and two ways to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.executor import Leaves
from funshampoo.blocks.layout import Layout
from funshampoo.blocks.portions import Portion
from funshampoo.blocks.regions import Parts
from funshampoo.blocks.stacks import stack_blocks, unstack_blocks
from funshampoo.blocks.state_rows import filled, rows_of_tensor
from funshampoo.core.tree import compute_dtype


class Given(NamedTuple):
    """The arguments of a step.

    Attributes:
        leaves: gradients.
        known: tensors with the leaves' shapes: the parameters, or else the gradients.
        missing: indices of the gradients that are None.
        shown: the parameters that the inner transformation may read.
        names: of the leaves; () in torch.compile.
        given: whether `known` are the parameters.
    """

    leaves: list[Any]
    known: list[Tensor]
    spec: Any
    layout: Layout
    missing: list[int]
    shown: list[Tensor | None] | None
    names: Sequence[str]
    given: bool

    def described(self) -> Leaves:
        """The description for ranks that share the step."""
        shown = None if self.shown is None else [x is not None for x in self.shown]
        known = self.known if self.given else None
        return Leaves(self.names, known, self.leaves, self.layout, shown)

    def missing_rows(self) -> dict[str, set[int]]:
        """{stack: the rows without a gradient}."""
        found: dict[str, set[int]] = {}
        for i in self.missing:
            for region in self.layout.parameters[i].regions:
                rows = range(region.first, region.first + region.rows)
                found.setdefault(region.stack, set()).update(rows)
        return found


class Views:
    """Rows gathered from views of the leaves, and updates written to views of new ones.

    Args:
        copies: whether to copy the updates, which are in memory that the next step reuses.
    """

    def __init__(self, parts: Parts, given: Given, copies: bool = False) -> None:
        self._parts, self._given, self._copies = parts, given, copies
        self._found: list[Tensor | None] = [None] * len(given.leaves)

    def gather(self, portion: Portion) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The gradients of these rows, and the parameters that are shown."""
        given = self._given
        stacks = {n: self._parts.gather(n, rows, given.leaves) for n, rows in portion.items()}
        if given.shown is None:
            return stacks, None
        shown = [torch.zeros_like(g) if p is None else p for p, g in zip(given.shown, given.known)]
        return stacks, {n: self._parts.gather(n, rows, shown) for n, rows in portion.items()}

    def updates(self, shared: bool) -> list[Tensor | None]:
        """One update per leaf; zeros for a parameter without elements, None without a gradient.

        Args:
            shared: a block's owner decides for all ranks whether there was a gradient.
        """
        missing = () if shared else self._given.missing
        found = enumerate(self._found)
        return [x if x is not None or i in missing else self._empty(i) for i, x in found]

    def put(self, stack: str, rows: range, values: Tensor) -> None:
        """Store some rows."""
        found = self._parts[stack, rows]
        if not self._copies and found.whole:
            updates, parameters = self._found, self._given.layout.parameters
            for i, own in zip(found.whole, values.unbind(0)):
                updates[i] = own if found.as_is else own.reshape(parameters[i].shape)
            return
        for i in {part.parameter for part in found.parts}:
            self._found[i] = self._empty(i) if self._found[i] is None else self._found[i]
        self._parts.scatter(stack, rows, values, self._found)

    def _empty(self, i: int) -> Tensor:
        leaf, where = self._given.known[i], self._given.layout.parameters[i]
        return torch.empty(where.shape, dtype=compute_dtype(leaf), device=leaf.device)


class Traced:
    """`Views` with new tensors only, as required by torch.func, autograd and torch.compile."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._stacks = stack_blocks(given.leaves, given.layout)
        self._shown = None if given.shown is None else stack_blocks(given.shown, given.layout)
        self._found: dict[str, list[tuple[range, Tensor]]] = {n: [] for n in self._stacks}

    def gather(self, portion: Portion) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The gradients of these rows, and the parameters that are shown."""
        return _rows(self._stacks, portion), self._shown and _rows(self._shown, portion)

    def put(self, stack: str, rows: range, values: Tensor) -> None:
        """Store some rows."""
        self._found[stack].append((rows, values))

    def updates(self, shared: bool) -> list[Tensor | None]:
        """One update per leaf; see `Views`."""
        zeros = {n: x.new_zeros(()).expand(x.shape) for n, x in self._stacks.items()}  # no memory
        whole = {name: filled(zeros[name], found) for name, found in self._found.items()}
        leaves: list[Any] = self._given.known if shared else self._given.leaves
        return unstack_blocks(whole, self._given.layout.parameters, leaves)


def _rows(stacks: dict[str, Tensor], portion: Portion) -> dict[str, Tensor]:
    return {name: rows_of_tensor(stacks[name], rows) for name, rows in portion.items()}
