"""Diagnostics of a state: the results of the last refresh."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from funshampoo.core.text import plural
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import check_is_state, walk
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import (
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
    everywhere: list[tuple[int, ...]] = []
    clock: Tensor | None = None
    for _, node in walk(state):
        counter = getattr(node, "steps", ())
        clock = counter if isinstance(counter, Tensor) else clock
        if isinstance(node, ShardedState):
            everywhere.append(tuple(int(n) for n in node.report.reshape(-1, 4).amax(0)))
        elif isinstance(node, GuardedState):
            held += sum(int(n.sum()) for n in flatten(node.held)[0])
        elif isinstance(node, SpikeState):
            spikes = (spikes or 0) + sum(int(n.sum()) for n in flatten(node.held)[0])
        elif isinstance(node, MultiStepsState):
            skipped += int(node.skipped.sum())
        elif isinstance(node, RefreshedState):
            steps = 0 if clock is None else int(clock.max())
    found = Health(steps, _factors(state), skipped, held, everywhere, spikes)
    print(found, file=file or sys.stdout)
    return found


def _factors(state: Any) -> list[FactorHealth]:
    sides: dict[Any, tuple[Place, dict[str, Tensor]]] = {}

    def collect(place: Place, x: Tensor) -> None:
        if place.kind is Kept and place.field != "value":
            side = place.path[:-1], place.stack, place.leaf
            sides.setdefault(side, (place, {}))[1][place.field] = x

    map_tensors(collect, state)
    found = []
    for place, kept in sides.values():
        residual, owners = _largest(kept["residual"]), place.owners()
        worst = int(torch.argmax(_rows(kept["residual"])))
        found.append(
            FactorHealth(
                where=f"{place.stack or '.'.join(place.leaf)} side {place.path[-2]}",
                matrices=kept["residual"].numel(),
                residual=residual,
                condition=_largest(kept["condition"]),
                failures=int(kept["failures"].sum()),
                worst=owners[worst][0] if owners and residual is not None else "",
            )
        )
    return found


def _largest(measured: Tensor) -> float | None:
    """The largest value; None if nothing was measured, which is -1."""
    largest = float(measured.max())
    return None if largest < 0 else largest


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.1e}"


def _rows(values: Tensor) -> Tensor:
    """The largest value of every row, over an ensemble's members if there are any."""
    return values.reshape(-1, values.shape[-1]).amax(0) if values.ndim else values.reshape(1)
