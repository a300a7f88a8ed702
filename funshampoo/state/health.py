"""What the last refresh found."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from funshampoo.state.stages import (
    BlockedState,
    FactorRoot,
    MultiStepsState,
    RootInverseState,
    walk,
)


class FactorHealth(NamedTuple):
    """One side of one stack (or leaf).

    Attributes:
        where: stack or leaf, and side: "64x147 side 0", "layers.0.weight side 1".
        matrices: how many factor matrices.
        residual: the largest residual of a root: the relative error of the eigenvalue it gets most
            wrong. In float32 rounding alone leaves up to about 1e-7 · condition, so 0.2 is usual at
            the default damping of 1e-6, along directions that the damping dominates anyway.
        condition: the largest condition number.
        failures: how many refreshes kept an old root, over all matrices.
        worst: the parameter whose root has the largest residual; "" outside `blocked`.
    """

    where: str
    matrices: int
    residual: float
    condition: float
    failures: int
    worst: str


class Health(NamedTuple):
    """What the last refresh found, and what was skipped.

    Attributes:
        steps: of the stage that refreshes; 0 if there is none.
        factors: one entry for every side of every stack.
        skipped: micro-batches that `multi_steps` left out.
    """

    steps: int
    factors: list[FactorHealth]
    skipped: int

    def __str__(self) -> str:
        if not self.factors:
            skipped = f"{self.skipped} micro-batches skipped"
            return f"no root_inverse in this state, so no roots to report; {skipped}"
        width = max([len("factor"), *(len(f.where) for f in self.factors)])
        lines = [
            f"{self.steps} steps, {self.skipped} micro-batches skipped",
            f"{'factor':<{width}} {'matrices':>8} {'residual':>9} {'condition':>9} "
            f"{'failures':>8}  worst",
        ]
        for f in self.factors:
            lines.append(
                f"{f.where:<{width}} {f.matrices:>8} {f.residual:>9.1e} {f.condition:>9.1e} "
                f"{f.failures:>8}  {f.worst}"
            )
        return "\n".join(lines)


def health(state: Any, *, file: TextIO | None = None) -> Health:
    """Print what the last refresh of a state found, and return the numbers. Reads the device.

    Args:
        state: of any transformation that contains a `root_inverse`; without one the list of factors
            is empty.
        file: where to print; standard output by default.

    >>> import torch
    >>> from funshampoo import shampoo
    >>> tx = shampoo(0.1)
    >>> params = {"w": torch.zeros(2, 3)}
    >>> _, state = tx.update({"w": torch.eye(2, 3)}, tx.init(params), params)
    >>> found = health(state)  # doctest: +ELLIPSIS
    1 steps, 0 micro-batches skipped
    factor     matrices  residual condition failures  worst
    2x3 side 0        1 ...
    2x3 side 1        1 ...
    """
    steps, skipped = 0, 0
    factors: list[FactorHealth] = []
    layout: Mapping[str, Any] = {}
    roots_at = 0
    for path, node in walk(state):
        if isinstance(node, BlockedState):
            layout = node.layout
        elif isinstance(node, MultiStepsState):
            skipped += int(node.skipped.sum())
        elif isinstance(node, RootInverseState):
            steps, roots_at = int(node.steps.max()), len(path) + 1
        elif isinstance(node, FactorRoot):
            factors.append(_factor(path[roots_at:], node, layout))
    found = Health(steps, factors, skipped)
    print(found, file=file or sys.stdout)
    return found


def _factor(path: tuple[str, ...], root: FactorRoot, layout: Mapping[str, Any]) -> FactorHealth:
    *inside, side = path
    leaf = ".".join(inside)
    worst = int(torch.argmax(_rows(root.residual)))
    return FactorHealth(
        where=f"{leaf} side {side}",
        matrices=root.residual.numel(),
        residual=float(root.residual.max()),
        condition=float(root.condition.max()),
        failures=int(root.failures.sum()),
        worst=_owner(layout, leaf, worst),
    )


def _rows(values: Tensor) -> Tensor:
    """The largest value of every row, over an ensemble's members if there are any."""
    return values.reshape(-1, values.shape[-1]).amax(0) if values.ndim else values.reshape(1)


def _owner(layout: Mapping[str, Any], stack: str, row: int) -> str:
    for parameter, stacks in layout.items():
        for span in stacks.get(stack, {}):
            first, last = map(int, span.split(":"))
            if first <= row < last:
                return parameter
    return ""
