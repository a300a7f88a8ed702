"""Diagnostics of a state: the results of the last refresh."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from funshampoo.core.text import plural
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import check_is_state
from funshampoo.state.places import block_names, rows_of, walk_blocks
from funshampoo.state.stages import (
    BlockedState,
    GuardedState,
    Kept,
    MultiStepsState,
    RefreshedState,
    ShardedState,
    SpikeState,
)


class FactorHealth(NamedTuple):
    """Health of one side of one stack (or leaf).

    Attributes:
        where: stack or leaf, and side: "64x147 side 0", "layers.0.weight side 1".
        matrices: the number of factor matrices.
        residual: the largest residual of a root: the relative error of its worst eigenvalue. In
            float32 rounding alone leaves up to about 1e-7 · condition, so 0.2 is usual at the
            default damping of 1e-6, along directions that the damping dominates anyway. None if no
            root has been computed, or it is not measured: eigenbases have no residual.
        condition: the largest condition number; None in the same cases.
        failures: how many refreshes kept an old root, over all matrices.
        worst: the parameter whose root has the largest residual; "" outside `blocked`, or if there
            is none.
    """

    where: str
    matrices: int
    residual: float | None
    condition: float | None
    failures: int
    worst: str


class Health(NamedTuple):
    """Results of the last refresh, and what was skipped.

    Attributes:
        steps: those of the stage that refreshes, or micro-steps of a `multi_steps` around it; 0 if
            there is none.
        factors: one entry for every side of every stack.
        skipped: micro-batches that `multi_steps` left out.
        held: how many times a block was held for a non-finite gradient, or a spike.
        ranks: for each `sharded`, over the blocks of all ranks: blocks held, the longest streak of
            that, roots failed, the longest streak of that. The other numbers are this rank's.
        spikes: how many of those held were spikes; None without a `spike_factor`.
    """

    steps: int
    factors: list[FactorHealth]
    skipped: int
    held: int
    ranks: list[tuple[int, ...]]
    spikes: int | None = None

    def __str__(self) -> str:
        skipped = f"{plural(self.skipped, 'micro-batch', 'micro-batches')} skipped"
        skipped += f", {plural(self.held, 'time')} a block held"
        if self.spikes is not None:
            skipped += f" ({plural(self.spikes, 'spike')})"
        if self.ranks:
            held, streak, failed, failed_streak = zip(*self.ranks)
            skipped += f"; all ranks: {sum(held)} held (up to {max(streak)} in a row)"
            skipped += (
                f", {plural(sum(failed), 'root')} failed (up to {max(failed_streak)} in a row)"
            )
        if not self.factors:
            return f"nothing in this state is refreshed, so no roots to report; {skipped}"
        width = max([len("factor"), *(len(f.where) for f in self.factors)])
        lines = [
            f"{plural(self.steps, 'step')}, {skipped}",
            f"{'factor':<{width}} {'matrices':>8} {'residual':>9} {'condition':>9} "
            f"{'failures':>8}  worst",
        ]
        for f in self.factors:
            lines.append(
                f"{f.where:<{width}} {f.matrices:>8} {_shown(f.residual):>9} "
                f"{_shown(f.condition):>9} {f.failures:>8}  {f.worst}"
            )
        return "\n".join(lines)


def health(state: Any, *, file: TextIO | None = None) -> Health:
    """Print the results of a state's last refresh, and return the numbers. Reads the device.

    Args:
        state: of any transformation; if it refreshes nothing (roots, eigenbases), the list of
            factors is empty. For the wrapper, one of `optimizer.chain_states()`.
        file: where to print; standard output by default.

    Raises:
        TypeError: state is that of a torch.optim.Optimizer.

    >>> import torch
    >>> from funshampoo import shampoo
    >>> tx = shampoo(0.1)
    >>> params = {"w": torch.zeros(2, 3)}
    >>> _, state = tx.update({"w": torch.eye(2, 3)}, tx.init(params), params)
    >>> found = health(state)  # doctest: +ELLIPSIS
    1 step, 0 micro-batches skipped, 0 times a block held
    factor     matrices  residual condition failures  worst
    2x3 side 0        1 ...
    2x3 side 1        1 ...
    """
    check_is_state(state)
    steps, skipped, held = 0, 0, 0
    spikes: int | None = None
    factors: list[FactorHealth] = []
    names: dict[str, dict[int, tuple[str, str]]] = {}
    owned: dict[str, Any] = {}
    everywhere: list[tuple[int, ...]] = []
    kept_at = 0
    clock: Tensor | None = None
    for path, node, around in walk_blocks(state):
        if around is None:
            names, owned = {}, {}
        counter = getattr(node, "steps", ())
        clock = counter if isinstance(counter, Tensor) else clock
        if isinstance(node, BlockedState):
            names, owned = block_names(node.layout), {}
        elif isinstance(node, ShardedState):
            owned = node.owned if names else {}
            everywhere.append(tuple(int(n) for n in node.report.reshape(-1, 4).amax(0)))
        elif isinstance(node, GuardedState):
            held += sum(int(n.sum()) for n in flatten(node.held)[0])
        elif isinstance(node, SpikeState):
            spikes = (spikes or 0) + sum(int(n.sum()) for n in flatten(node.held)[0])
        elif isinstance(node, MultiStepsState):
            skipped += int(node.skipped.sum())
        elif isinstance(node, RefreshedState):
            steps, kept_at = 0 if clock is None else int(clock.max()), len(path) + 1
        elif isinstance(node, Kept):
            factors.append(_factor(path[kept_at:], node, names, owned))
    found = Health(steps, factors, skipped, held, everywhere, spikes)
    print(found, file=file or sys.stdout)
    return found


def _factor(
    path: tuple[str, ...],
    kept: Kept,
    names: Mapping[str, Mapping[int, tuple[str, str]]],
    owned: Mapping[str, Any],
) -> FactorHealth:
    *inside, side = path
    leaf = ".".join(inside)
    residual = _largest(kept.residual)
    worst = int(torch.argmax(_rows(kept.residual)))
    row = rows_of(owned[leaf])[worst] if leaf in owned else worst
    return FactorHealth(
        where=f"{leaf} side {side}",
        matrices=kept.residual.numel(),
        residual=residual,
        condition=_largest(kept.condition),
        failures=int(kept.failures.sum()),
        worst=names[leaf][row][0] if leaf in names and residual is not None else "",
    )


def _largest(measured: Tensor) -> float | None:
    """The largest value; None if nothing was measured, which is -1."""
    largest = float(measured.max())
    return None if largest < 0 else largest


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.1e}"


def _rows(values: Tensor) -> Tensor:
    """The largest value of every row, over an ensemble's members if there are any."""
    return values.reshape(-1, values.shape[-1]).amax(0) if values.ndim else values.reshape(1)
