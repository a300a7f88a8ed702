"""Checks for a stage inside `blocked`: blocks are independent, and faulty ones are held."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.guard import guarded
from funshampoo.core.context import Context, with_cut
from funshampoo.core.contract import GradientTransformation, State, Tree
from funshampoo.core.tree import flatten
from funshampoo.state.meaning import kind_of
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import Kept
from funshampoo.testing.trial import Run, Trial, difference, like, not_finite

ROWS = 5
OTHER_ORDER, TWO_PARTS = [3, 0, 4, 2, 1], ([0, 1], [2, 3, 4])
"""Rows that are stepped elsewhere."""

FAULTY = 1
"""The row of each stack whose gradient is NaN."""

FAULT = 2
"""The step of the fault, from 0."""

_BY_ITSELF = (
    "Reduce over the axes from block_ndim on alone, and keep what is counted or averaged by row. "
    "Where a stage looks across blocks by nature, pass blocks=False, and leave out `tile` of the "
    "`blocked` around it."
)

_ROUNDED_ALIKE = (
    "So the numbers of several ranks would not be bitwise those of one process. Multiply matrices "
    "by matmul, raise to powers by power, and call functions of torch.linalg through each_matrix, "
    "all of funshampoo.authoring; or pass bitwise=False."
)

_LEAVE_OUT = (
    "Leave a row out of what is averaged where `alive` in the context is 0, with the weight that "
    "it would have had; or do not declare `alive` (nor take the whole context), and guarded puts "
    "its state back."
)


_IN_ONE_WAY = (
    "So the numbers of several ranks, of which one holds that block, would not be bitwise those of "
    "one process. Compute what is kept in the same order whether `alive` is None or not: a factor "
    "that differs by row only with it is multiplied in by itself also without it."
)


def _stacks_of(trial: Trial) -> _Stacks:
    """The stacks of a trial, made once, since its checks share a run."""
    found: _Stacks = trial.found.setdefault("stacks", _Stacks(trial))
    return found


def rows_lead(trial: Trial) -> None:
    """State tensors start with the axis of their stack's rows, or are 0-dimensional."""
    stacks = _stacks_of(trial)

    def look(place: Place, x: Tensor) -> None:
        name = "/".join(place.path)
        if x.ndim and place.stack is None:
            trial.fail(
                f"inside blocked, the tensor '{name}' of the state, shape {tuple(x.shape)}, "
                "belongs to no stack",
                "Keep what has rows in a tree over what init gets, as map_leaves makes it; the "
                "rest is 0-dimensional.",
            )
        if x.ndim and x.shape[0] != ROWS:
            trial.fail(
                f"inside blocked, the tensor '{name}' of the state has shape {tuple(x.shape)} "
                f"where stack '{place.stack}' has {ROWS} rows",
                "Declare block_ndim in init, and give per-block numbers the shape "
                "p.shape[:block_ndim].",
            )

    for state in (stacks.whole.states[0], stacks.whole.states[-1]):
        map_tensors(look, state, stacks=stacks.names)


def rows_in_another_order(trial: Trial) -> None:
    """Permuted rows give permuted results."""
    _rows_alone(trial, [OTHER_ORDER], "in another order")


def rows_in_two_parts(trial: Trial) -> None:
    """Rows in two separate parts give the same results as all together."""
    _rows_alone(trial, TWO_PARTS, "without the other blocks of its stack")


def rows_are_rounded_alike(trial: Trial) -> None:
    """Rows elsewhere in memory have the same bits, as on another rank. Promised on a CPU alone."""
    stacks = _stacks_of(trial)
    if not stacks.have_bits:
        return
    for rows in (OTHER_ORDER, *TWO_PARTS):
        pairs = zip(stacks.alone(rows).updates, stacks.whole.updates)
        for t, (found, together) in enumerate(pairs, start=1):
            if seen := difference(found, stacks.chosen(together, rows)):
                trial.fail(
                    f"a block elsewhere in its stack is rounded otherwise in step {t}, {seen}",
                    _ROUNDED_ALIKE,
                )


def _rows_alone(trial: Trial, parts: Sequence[list[int]], how: str) -> None:
    stacks = _stacks_of(trial)
    whole = stacks.whole
    for rows in parts:
        part = stacks.alone(rows)
        for t, (found, together) in enumerate(zip(part.updates, whole.updates), start=1):
            expected = stacks.chosen(together, rows)
            if seen := difference(found, expected, trial.tolerance):
                trial.fail(f"a block {how} has other updates in step {t}, {seen}", _BY_ITSELF)
        mine, theirs = (
            stacks.without_estimates(state)
            for state in (part.states[-1], stacks.chosen(whole.states[-1], rows))
        )
        if seen := difference(mine, theirs, trial.tolerance):
            trial.fail(f"a block {how} has another state, {seen}", _BY_ITSELF)


def faulty_blocks_are_held(trial: Trial) -> None:
    """A block with a gradient of NaN is held by `guarded` around the stage."""
    stacks = _stacks_of(trial)
    grads = stacks.with_fault(math.nan)
    held = guarded(trial.tx, max_failures=None)
    clean, faulty = stacks.run(held), stacks.run(held, grads)
    others = [i for i in range(ROWS) if i != FAULTY]
    for t in range(FAULT, len(grads)):
        updates, state = faulty.updates[t], faulty.states[t + 1]
        if name := not_finite(updates) or not_finite(stacks.without_reports(state)):
            trial.fail(
                f"a gradient of NaN in a block got into '{name}' in step {t + 1}", _LEAVE_OUT
            )
        if t == FAULT and any([u[FAULTY].any() for u in updates.values()]):
            trial.fail("the update of a block whose gradient is NaN is not zero", _LEAVE_OUT)
        found, expected = (stacks.chosen(run.updates[t], others) for run in (faulty, clean))
        if seen := difference(found, expected, trial.tolerance):
            trial.fail(f"a gradient of NaN in a block changed those of others, {seen}", _LEAVE_OUT)
        if stacks.have_bits and (seen := difference(found, expected)):
            trial.fail(f"blocks beside one that is held are rounded otherwise, {seen}", _IN_ONE_WAY)
    _check_no_zero_was_averaged(trial, stacks, faulty)
    donated = stacks.run(held, grads, donate=True)
    if seen := difference(donated.updates, faulty.updates):
        trial.fail(f"with donate=True a block is held in another way, {seen}", _LEAVE_OUT)


def _check_no_zero_was_averaged(trial: Trial, stacks: _Stacks, faulty: Run) -> None:
    """A held block's state is not the result of a zero gradient, unless holding gives the same.

    A block may continue as if the step had not happened, or as in an average: with less weight, in
    both average and weight, for earlier gradients. So a stage that ignores `alive` is not detected
    if another one in the chain respects it.
    """
    zeros = stacks.run(trial.tx, stacks.with_fault(0.0))
    # The same stage, but `guarded` itself restores the rows that are not alive.
    unaware = copy.copy(trial.tx)
    unaware.minds_alive = False
    put_back = stacks.run(guarded(unaware, max_failures=None), stacks.with_fault(math.nan))
    found, as_zero, unmoved = (
        stacks.without_estimates(stacks.chosen(state, [FAULTY]))
        for state in (faulty.states[-1].inner, zeros.states[-1], put_back.states[-1].inner)
    )
    if not difference(found, as_zero, trial.tolerance) and (
        seen := difference(found, unmoved, trial.tolerance)
    ):
        trial.fail(
            "what is remembered of a block whose gradient was NaN was moved as by a gradient of "
            f"zeros, {seen}",
            _LEAVE_OUT,
        )


class _Stacks:
    """Block space as in `blocked`: one stack for each shape of the trial's leaves."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        leaves = [x for x in flatten(trial.params)[0] if x.numel()]
        shapes = {"x".join(map(str, x.shape)) or "scalar": x for x in leaves}
        self.names = list(shapes)
        self.params = like({n: x.expand(ROWS, *x.shape) for n, x in shapes.items()}, seed=1)
        self.grads = [like(self.params, seed=200 + t) for t in range(len(trial.grads))]
        self.context = with_cut(Context(extra=trial.context), trial.params, self._stacked).extra
        self._alone: dict[tuple[int, ...], Run] = {}

    @property
    def have_bits(self) -> bool:
        """Whether the same blocks elsewhere, or beside others, have the same bits."""
        cpu = all([x.is_cpu for x in self.params.values()])
        return cpu and bool(self.trial.options["bitwise"])

    def _stacked(self, tree: Tree) -> Tree:
        """What the caller passes, as `blocked` cuts it: the same for all rows of a stack."""
        shapes = {x.shape: x for x in flatten(tree)[0]}
        return {n: shapes[p.shape[1:]].expand(p.shape) for n, p in self.params.items()}

    def _own(self, value: Any, rows: Sequence[int]) -> Any:
        cut = isinstance(value, dict) and list(value) == self.names
        return self.chosen(value, rows) if cut else value

    def run(
        self,
        tx: GradientTransformation,
        grads: list[Tree] | None = None,
        rows: Sequence[int] = range(ROWS),
        **context: Any,
    ) -> Run:
        """All steps on some rows of each stack. The parameters stay as they are."""
        params = self.chosen(self.params, rows)
        run = Run([], [params], [tx.init(params, block_ndim=1)])
        ids = {n: [i * ROWS + row for row in rows] for i, n in enumerate(self.names)}
        for g in self.grads if grads is None else grads:
            here = self.chosen(g, rows)
            own = {name: self._own(value, rows) for name, value in self.context.items()}
            given = {**own, **context, "gradient": here, "rows": ids}
            updates, state = tx.update(here, run.states[-1], params, block_ndim=1, **given)
            run.updates.append(updates)
            run.states.append(state)
        return run

    @functools.cached_property
    def whole(self) -> Run:
        """All steps of the stage on all rows. Read-only."""
        return self.run(self.trial.tx)

    def alone(self, rows: list[int]) -> Run:
        """All steps of the stage on some rows. Read-only."""
        key = tuple(rows)
        if key not in self._alone:
            self._alone[key] = self.run(self.trial.tx, rows=rows)
        return self._alone[key]

    def with_fault(self, value: float) -> list[Tree]:
        """The gradients, where one block of each stack has this value on one step."""

        def at_fault(g: Tensor) -> Tensor:
            return g.index_fill(0, torch.tensor([FAULTY], device=g.device), value)

        faulty = {name: at_fault(g) for name, g in self.grads[FAULT].items()}
        return [*self.grads[:FAULT], faulty, *self.grads[FAULT + 1 :]]

    def chosen(self, tree: Any, rows: Sequence[int]) -> Any:
        """Some rows of every tensor in stacks, or in a state."""
        index = torch.tensor(list(rows))

        def choose(place: Place, x: Tensor) -> Tensor:
            by_row = place.stack is not None and x.ndim
            return x.index_select(0, index.to(x.device)) if by_row else x

        return map_tensors(choose, tree, stacks=self.names)

    def without_reports(self, state: State) -> State:
        """Drop what is declared to have any value, such as a best loss, from infinity on."""

        def known(place: Place, x: Tensor) -> Tensor:
            return torch.zeros_like(x) if kind_of(place.kind, place.field) == "any" else x

        return map_tensors(known, state, stacks=self.names)

    def without_estimates(self, state: State) -> State:
        """Drop errors and conditions of kept values: they are estimates that depend on rounding."""

        def known(place: Place, x: Tensor) -> Tensor:
            estimated = place.kind is Kept and place.path[-1] in ("residual", "condition")
            return torch.zeros_like(x) if estimated else x

        return map_tensors(known, state, stacks=self.names)
