"""What is computed now and then from matrices, one value a side of every block: roots, bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.clock import current_step, new_counter
from funshampoo.core.contract import Tree
from funshampoo.core.modes import full_precision, is_traced
from funshampoo.core.tree import compute_dtype, map_leaves, update_leaves
from funshampoo.operators.packed import pack, packs
from funshampoo.refresh.jobs import Job, Reading
from funshampoo.refresh.rule import Rule
from funshampoo.refresh.solving import carry_out
from funshampoo.refresh.turns import BlockIds, RefreshSchedule, Turn, everybody
from funshampoo.state.stages import Kept, RefreshedState


@dataclass(frozen=True)
class Refreshing:
    """Values that are computed anew on some steps and used on all of them.

    A block has a *unit* for every rule, as a rule one a side. The stage that has it calls `init`
    and `update` in its own, keeps the `RefreshedState`, and reads `Kept.value` there; its
    GradientTransformation has `refreshes=` (by `due`).

    A refresh keeps the old value of a matrix for which the rule does not converge, and counts it.
    It also keeps it, uncounted, where the matrix is exactly zero: nothing has been seen yet.

    Args:
        rules: the shape of a block -> a rule or None for each unit. It is asked on every refresh,
            so that rules with other numbers take over at the next one.
        schedule: when.
        packed: keep one triangle of each of a value's symmetric tensors of side 64 or more.
    """

    rules: Callable[[tuple[int, ...]], Sequence[Rule | None]]
    schedule: RefreshSchedule
    packed: bool = False

    def init(self, params: Tree, block_ndim: int = 0) -> RefreshedState:
        """Initial values for every leaf."""

        def initial(x: Tensor) -> tuple[Kept | tuple[()], ...]:
            rules = self.rules(tuple(x.shape[block_ndim:]))
            lead = x.shape[:block_ndim]
            return tuple(
                [self._initial(x, lead, r) if r is not None and x.numel() else () for r in rules]
            )

        return RefreshedState(new_counter(), map_leaves(initial, params))

    def due(self, state: RefreshedState, step: int | None = None) -> bool:
        """Whether an update of this state refreshes anything by the schedule."""
        t = current_step(state.steps, step)
        return t is not None and self.schedule.happens_at(t)

    def cost(self, block: tuple[int, ...]) -> float:
        """Modelled seconds a step of one block of this shape."""
        return (
            sum([rule.cost for rule in self.rules(block) if rule is not None]) / self.schedule.every
        )

    def update(
        self,
        updates: Tree,
        state: RefreshedState,
        inputs: Sequence[Tree],
        read: Callable[..., Reading],
        *,
        block_ndim: int = 0,
        step: int | None = None,
        refresh: bool | None = None,
        block_ids: BlockIds = None,
        donate: bool = False,
    ) -> RefreshedState:
        """The state after a step, refreshed where it is somebody's turn.

        Args:
            updates: the tree whose structure rules; what is None stays as it is.
            state: before.
            inputs: trees that the matrices are made from, such as the factors and their weights.
            read: `read(unit, *inputs of a leaf) -> (function, *tensors)`: the unit's matrices
                (..., d, d) are `function(*tensors)`. It is called with some rows of all tensors
                (of one without axes, with the tensor), and perhaps in another thread.
            block_ndim, step, refresh, block_ids, donate: of the context.

        Raises:
            RuntimeError: inside torch.compile without `step` or `refresh`.
        """
        turns = self._turns(updates, state, step, refresh, block_ids)
        kept = state.kept
        if turns is None:
            return RefreshedState(state.steps + 1, kept)
        jobs: list[Job] = []

        def begun(u: Tensor, turn: Turn, *rest: Any) -> tuple[Tensor, tuple[Any, ...]]:
            *given, units = rest
            rules = self.rules(tuple(u.shape[block_ndim:])) if turn.any else [None] * len(units)
            own = [
                Job(rule, read(i, *given), unit, turn.which) if rule is not None and unit else unit
                for i, (rule, unit) in enumerate(zip(rules, units))
            ]
            jobs.extend([job for job in own if isinstance(job, Job)])
            return u, tuple(own)

        def ended(u: Tensor, units: Any) -> tuple[Tensor, tuple[Any, ...]]:
            writes = donate and not is_traced()
            return u, tuple([x.ended(writes) if isinstance(x, Job) else x for x in units])

        with full_precision():
            # All work is known before any of it begins, so that threads share it evenly.
            _, on_their_way = update_leaves(begun, updates, (kept,), (turns, *inputs))
            carry_out(jobs, in_blocks=block_ndim > 0)
            _, kept = update_leaves(ended, updates, (on_their_way,))
        return RefreshedState(state.steps + 1, kept)

    def _initial(self, x: Tensor, lead: torch.Size, rule: Rule) -> Kept:
        dtype = compute_dtype(x)
        like = x.new_zeros((), dtype=dtype).expand(*lead, rule.side, rule.side)
        value = [
            (pack(y) if i in rule.symmetric and packs(rule.side, self.packed) else y).clone(
                memory_format=torch.contiguous_format
            )
            for i, y in enumerate(rule.initial(like))
        ]
        return Kept(
            value=tuple(value),
            residual=x.new_zeros(lead, dtype=dtype),
            condition=x.new_ones(lead, dtype=dtype),
            failures=x.new_zeros(lead, dtype=torch.int64),
            streak=x.new_zeros(lead, dtype=torch.int64),
            rounds=x.new_zeros(lead, dtype=torch.int64),
        )

    def _turns(
        self,
        updates: Tree,
        state: RefreshedState,
        step: int | None,
        refresh: bool | None,
        block_ids: BlockIds,
    ) -> Tree:
        """A tree of `Turn`s, or None for nobody."""
        if refresh is not None:
            return everybody(updates) if refresh else None
        t = current_step(state.steps, step)
        if t is None:
            raise RuntimeError(
                "the step counter can't be read inside torch.compile, so nobody knows whether this "
                "step refreshes. Let funshampoo compile (compiled(tx), or Optimizer(..., "
                "compile=True)), or pass step= (from 1) or refresh=funshampoo.refresh_due(step, "
                "every, start) to update."
            )
        return self.schedule.turns_at(t, updates, block_ids)
