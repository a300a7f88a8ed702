"""Values computed periodically from matrices, one per side of every block: roots, bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.clock import advanced, running, started
from funshampoo.core.context import Context
from funshampoo.core.contract import Tree
from funshampoo.core.modes import full_precision, is_traced
from funshampoo.core.tree import compute_dtype, map_leaves, update_leaves
from funshampoo.operators.packed import pack, packs
from funshampoo.refresh.jobs import Job, Reading
from funshampoo.refresh.rule import Rule
from funshampoo.refresh.solving import carry_out
from funshampoo.refresh.turns import RefreshSchedule, Turn, everybody
from funshampoo.state.stages import Kept, RefreshedState


@dataclass(frozen=True)
class Refreshing:
    """Values that are recomputed on some steps and used on all.

    A block has one *unit* per rule, usually one per side. The stage that owns it calls `init` and
    `update` in its own, keeps the `RefreshedState`, and reads `Kept.value` there; its
    GradientTransformation has `phase=schedule.phase()` and `counts=True`.

    If the rule does not converge for a matrix, the refresh keeps its old value and counts the
    failure. It also keeps the old value, uncounted, if the matrix is zero, since nothing has been
    accumulated yet, or has only denormal numbers, since nothing is left of it.

    Args:
        rules: the shape of a block -> a rule or None for each unit. It is called on every refresh,
            so that rules with new settings apply from the next one.
        schedule: the steps with a refresh.
        packed: store one triangle of each symmetric tensor of side 64 or more in a value.
    """

    rules: Callable[[tuple[int, ...]], Sequence[Rule | None]]
    schedule: RefreshSchedule
    packed: bool = False

    def init(
        self, params: Tree, block_ndim: int = 0, clock: bool = False, factors: Tree = None
    ) -> RefreshedState:
        """Initial values for every leaf.

        Args:
            params, block_ndim, clock: the arguments of the stage's init.
            factors: a tree of tuples, one entry per unit; values exist only where the entry is a
                tensor. None: wherever there is a rule.
        """

        def initial(x: Tensor, *sides: Any) -> tuple[Kept | tuple[()], ...]:
            rules = list(self.rules(tuple(x.shape[block_ndim:])))
            if sides:
                rules = [r if isinstance(side, Tensor) else None for r, side in zip(rules, *sides)]
            lead = x.shape[:block_ndim]
            return tuple(
                [self._initial(x, lead, r) if r is not None and x.numel() else () for r in rules]
            )

        known = () if factors is None else (factors,)
        return RefreshedState(map_leaves(initial, params, *known), started(True, clock))

    def update(
        self,
        updates: Tree,
        state: RefreshedState,
        inputs: Sequence[Tree],
        read: Callable[..., Reading],
        context: Context,
    ) -> RefreshedState:
        """The state after a step, with values refreshed where it is their turn.

        Args:
            updates: the tree that sets the structure; leaves of None stay as they are.
            state: the old state.
            inputs: trees from which the matrices are made, such as the factors and their weights.
            read: `read(unit, *inputs of a leaf) -> (function, *tensors)`: the unit's matrices (...,
                d, d) are `function(*tensors)`. The function gets some rows of all tensors (a tensor
                without axes as it is), and may run in another thread.
            context: the stage's.

        Raises:
            RuntimeError: inside torch.compile without `step` or `refresh`.
        """
        context = running(state.steps, context)
        block_ndim, donate = context.block_ndim, context.donate
        turns = self._turns(updates, context)
        kept = state.kept
        if turns is None:
            return RefreshedState(kept, advanced(state.steps, donate))
        jobs: list[Job] = []

        known = () if context.alive is None else (context.alive,)

        def begun(u: Tensor, turn: Turn, *rest: Any) -> tuple[Tensor, tuple[Any, ...]]:
            alive, (*given, units) = (rest[0], rest[1:]) if known else (None, rest)
            rules = self.rules(tuple(u.shape[block_ndim:])) if turn.any else [None] * len(units)
            own = [
                Job(rule, read(i, *given), unit, turn.which, alive)
                if rule is not None and unit
                else unit
                for i, (rule, unit) in enumerate(zip(rules, units))
            ]
            jobs.extend([job for job in own if isinstance(job, Job)])
            return u, tuple(own)

        def ended(u: Tensor, units: Any) -> tuple[Tensor, tuple[Any, ...]]:
            writes = donate and not is_traced()
            return u, tuple([x.ended(writes) if isinstance(x, Job) else x for x in units])

        with full_precision():
            # Collect all work before starting any, so that threads share it evenly.
            _, on_their_way = update_leaves(begun, updates, (kept,), (turns, *known, *inputs))
            carry_out(jobs, in_blocks=block_ndim > 0)
            _, kept = update_leaves(ended, updates, (on_their_way,))
        return RefreshedState(kept, advanced(state.steps, donate))

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
            residual=x.new_full(lead, -1, dtype=dtype),
            condition=x.new_full(lead, -1, dtype=dtype),
            failures=x.new_zeros(lead, dtype=torch.int64),
            streak=x.new_zeros(lead, dtype=torch.int64),
            rounds=x.new_zeros(lead, dtype=torch.int64),
        )

    def _turns(self, updates: Tree, context: Context) -> Tree:
        """A tree of `Turn`s, or None if there are none."""
        if context.refresh is not None:
            return everybody(updates) if context.refresh else None
        if context.step is None:
            raise RuntimeError(
                "the step counter can't be read inside torch.compile, so nobody knows whether this "
                "step refreshes. Let funshampoo compile (compiled(tx), or Optimizer(..., "
                "compile=True)), or pass step= (from 1) or refresh=funshampoo.refresh_due(step, "
                "every, start) to update."
            )
        return self.schedule.turns_at(context.step, updates, context.rows)
