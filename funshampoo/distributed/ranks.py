"""The owners of all blocks, and this rank's step among the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.executor import Leaves, Put, StepOnRows
from funshampoo.combinators.failures import failure_report
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import EMPTY, Context
from funshampoo.core.contract import GradientTransformation
from funshampoo.core.placed import is_in_parts, places_of
from funshampoo.distributed.agreement import Agreement, fingerprint_of
from funshampoo.distributed.all_gather import AllGather
from funshampoo.distributed.collectives import (
    ProcessGroup,
    check_outside_transforms,
    gathered_objects,
    rank_and_size,
)
from funshampoo.distributed.cost import BY_SIZE, DEFAULT_COST, CostModel
from funshampoo.distributed.disagreement import PreviousStep, RankStatus, check_statuses
from funshampoo.distributed.exchange import Transport, zeroing_nonfinite
from funshampoo.distributed.ownership import Works, costs_of, owners_of, works_of
from funshampoo.distributed.parts import Parts
from funshampoo.distributed.shards import Blocks, Shards, shards_of
from funshampoo.distributed.transfer import Transfer
from funshampoo.state.parts import run_of
from funshampoo.state.stages import ShardedState


@dataclass(frozen=True)
class Ranks:
    """`sharded` with its arguments: how the blocks of a step are spread over ranks.

    Attributes:
        whole: whether whole parameters are sharded, not only DTensors.
        counts: whether its state has a counter of steps.
    """

    inner: GradientTransformation
    group: ProcessGroup | None
    every: int
    communication_dtype: torch.dtype | None
    cost: CostModel | None
    agreement: Agreement = field(repr=False)
    whole: bool
    counts: bool
    overlap: int
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)  # of `AllGather`
    known_shards: dict[Any, Shards] = field(default_factory=dict, repr=False)
    known_parts: dict[int, Parts] = field(default_factory=dict, repr=False)

    def shards(self, blocks: Blocks) -> Shards:
        """The shards of all ranks."""
        _, size = rank_and_size(self.group)
        check_outside_transforms()
        dtype = self._dtype(blocks)
        key = tuple(blocks.stacks.items()), blocks.in_blocks, size, dtype
        if key not in self.known_shards:
            if len(self.known_shards) > 64:  # groups were edited; each entry is for one tree
                self.known_shards.clear()
            works = self._works(blocks) if blocks.in_blocks else None
            owners = owners_of(blocks.stacks, size, self.every, self._model(blocks), works)
            self.known_shards[key] = shards_of(blocks.stacks, owners, size, dtype)
        return self.known_shards[key]

    def _model(self, blocks: Blocks) -> CostModel:
        return self.cost or (DEFAULT_COST if blocks.in_blocks else BY_SIZE)

    def _works(self, blocks: Blocks) -> Works:
        shapes = {name: stack.block for name, stack in blocks.stacks.items()}
        like = {n: torch.empty(1, *block, device="meta") for n, block in shapes.items()}
        return works_of(self.inner, shapes, self.inner.init(like, block_ndim=1))

    def _dtype(self, blocks: Blocks) -> torch.dtype:
        return self.communication_dtype or blocks.dtype

    def is_shared(self) -> bool:
        """Whether other ranks share the step."""
        return self.in_use and rank_and_size(self.group)[1] > 1

    @property
    def in_use(self) -> bool:
        """Whether anything seen so far is sharded."""
        return self.whole or bool(self.known_parts)

    def own(self, blocks: Blocks) -> dict[str, range]:
        """{stack: this rank's rows}, without stacks of which it owns none."""
        rank, size = rank_and_size(self.group)
        if size > 1:
            return self.shards(blocks).owned_by(rank)
        return {name: range(stack.rows) for name, stack in blocks.stacks.items()}

    def begin(self, leaves: Leaves, **context: Any) -> ShardedState:
        """The state of this rank's blocks, for sharded parameters (DTensors).

        A collective: stages may initialize from the parameters.

        Args:
            leaves: the parameters, both as `parameters` and as `gradients`.
        """
        blocks = Blocks.of(leaves.where.stacks)
        parts = self._parts(leaves, blocks, EMPTY)
        transfer = Transfer(parts, leaves, 1, blocks.dtype, blocks.device, {})
        transfer.gather()
        context["clock"] = clock = context["clock"] or self.counts
        inner = self.inner.init(transfer.rows_of(transfer.cuts[0])[0], **context)
        return self.begun(inner, copy.deepcopy(parts.owned), blocks.device, clock)

    def begun(
        self, inner: Any, owned: dict[str, Any], device: torch.device, clock: bool
    ) -> ShardedState:
        """The state of this rank, from the state of the blocks that it owns."""
        rank, size = rank_and_size(self.group)
        names: dict[str, tuple[()]] = {f"{rank} of {size}": ()}
        report = failure_report(inner, device)
        run = torch.zeros((), dtype=torch.int64, device="cpu")
        return ShardedState(inner, owned, names, report, started(self.counts, clock), run)

    def exchange(
        self,
        step: Callable[[Any, dict[str, range], Put], Any],
        put: Put,
        state: ShardedState,
        context: Context,
        leaves: Leaves,
        absent: bool,
    ) -> ShardedState:
        """Run `step(inner state, own rows, put)`, and pass the results of all ranks to `put`.

        Args:
            leaves: what is stepped and where it is, for comparison with other ranks; outside
                blocks that is in `Blocks` of their own.
            absent: whether rows of this rank have no gradient, and so are not put.

        Returns:
            The new state.
        """
        where = leaves.where
        blocks = where if isinstance(where, Blocks) else Blocks.of(where.stacks)
        rank, size = rank_and_size(self.group)
        own = self.own(blocks)
        owned = blocks.described(own)
        if size == 1:
            self._check_owned(owned, state)
            new = step(state.inner, own, put)
            report = failure_report(new, blocks.device) if self._is_due(context) else state.report
            steps = advanced(state.steps, context.donate)
            return ShardedState(new, state.owned, state.ranks, report, steps, state.run)
        shards, dtype = self.shards(blocks), self._dtype(blocks)
        rank_status = self.agreement.rank_status(
            shards, leaves, context, blocks.device, run_of(state)
        )
        key = blocks.device, dtype, shards.length * size
        transport = AllGather(shards, rank, self.group, key, self.memory if context.donate else {})

        def own_step(inner: Any, place: Put) -> Any:
            return step(inner, own, place)

        found = self._step_and_exchange(
            transport, own_step, owned, state, blocks, context, absent, rank_status
        )
        for stack, rows, x in transport.pieces:
            put(stack, rows, x)
        return found

    def exchange_parts(
        self, step: StepOnRows, state: ShardedState, context: Context, leaves: Leaves, absent: bool
    ) -> tuple[ShardedState, list[Tensor]]:
        """`exchange` for sharded parameters (DTensors).

        Runs `step(inner state, rows of the full stacks, cuts, gather, put)`. Its portions count
        this rank's rows from 0, and each is within one of the cuts.

        Returns:
            The new state, and for every leaf the update of this rank's part, in any shape.
        """
        blocks = Blocks.of(leaves.where.stacks)
        parts, dtype = self._parts(leaves, blocks, context), self._dtype(blocks)
        rank_status = RankStatus()
        if parts.size > 1:
            if parts.has_new_dtypes(leaves):
                self.agreement.announce_change(leaves, context)
                self.agreement.reset()
                parts.reset_dtypes(leaves)
            known = zip(leaves.names, leaves.gradients, leaves.parameters or ())
            missing = [n for n, g, p in known if g is None and is_in_parts(p)] if absent else ()
            what = parts.shards, leaves, context, blocks.device, run_of(state), missing
            rank_status = self.agreement.rank_status(*what)
        memory = parts.memory.setdefault(dtype, {})  # used by no one else
        transfer = Transfer(parts, leaves, self.overlap, dtype, blocks.device, memory)

        def own_step(inner: Any, place: Put) -> Any:
            return step(inner, parts.ids, transfer.cuts, transfer.rows_of, place)

        new = self._step_and_exchange(
            transfer, own_step, parts.owned, state, blocks, context, absent, rank_status
        )
        return new, transfer.updates

    def _step_and_exchange(
        self,
        transport: Transport,
        step: Callable[[Any, Put], Any],
        owned: Any,
        state: ShardedState,
        blocks: Blocks,
        context: Context,
        absent: bool,
        rank_status: RankStatus,
    ) -> ShardedState:
        """This rank's step, and the collective after it. Returns the new state."""
        number, due = context.step, self._is_due(context)
        steps = advanced(state.steps, context.donate)
        if absent:
            transport.sent.zero_()
        if transport.sent.dtype != blocks.dtype:
            step = zeroing_nonfinite(step, transport.sent, transport.places)

        def checked(put: Put) -> Any:
            # An error on this rank alone must be raised inside its step: the others are waiting.
            self._check_owned(owned, state)
            return step(state.inner, put)

        new, statuses = transport.exchange(checked, due, rank_status)
        always = blocks.device.type == "cpu"
        if always or number is None or number % self.every == 0:
            check_statuses(statuses.tolist(), rank_status, self.group)
        self.agreement.record_step(PreviousStep(transport.repeater(), 1 if always else self.every))
        report, run = report_of(statuses) if due else state.report, state.run
        if rank_status.content:
            run = torch.tensor(fingerprint_of(statuses[:, 7].tolist(), 40) | 1, device="cpu")
        return ShardedState(new, state.owned, state.ranks, report, steps, run)

    def _is_due(self, context: Context) -> bool:
        """Whether streaks are reported: on the step before each multiple of `every`."""
        return context.step is None or (context.step + 1) % self.every == 0

    def _parts(self, leaves: Leaves, blocks: Blocks, context: Context) -> Parts:
        """Which rank has which part. The first time for these parameters it is a collective."""
        known = leaves.gradients if leaves.parameters is None else leaves.parameters
        found = self.known_parts.get(id(leaves.where))  # as in `blocked`, whose layout this is
        same = found is not None and found.layout is leaves.where
        if found is None or not same or found.placed != places_of(known):
            self.agreement.announce_change(leaves, context)
            if len(self.known_parts) > 3:  # groups were edited, and buffers are large
                self.known_parts.clear()
            model, works = self._model(blocks), self._works(blocks)
            costs = costs_of(blocks.stacks, self.every, model, works)
            found = self.known_parts[id(leaves.where)] = Parts(leaves, costs, self.group)
        return found

    def everywhere(self, blocks: list[str]) -> list[str]:
        """The blocks that all ranks name: all call this, since they gathered the same report."""
        _, size = rank_and_size(self.group)
        if size == 1:
            return blocks
        return [block for part in gathered_objects(blocks, self.group) for block in part]

    def _check_owned(self, owned: Any, state: ShardedState) -> None:
        rank, size = rank_and_size(self.group)
        if state.owned != owned or state.ranks != {f"{rank} of {size}": ()}:
            raise ValueError(
                "sharded: the state holds other blocks than this rank owns. Call init on the ranks "
                "that train; to go on from a checkpoint of other ranks, use "
                "funshampoo.state.load_state_dict(tx.init(params), saved)."
            )


def report_of(statuses: Tensor) -> Tensor:
    """`failure_report` of the blocks of all ranks together."""
    totals, longest = statuses[:, (1, 3)].sum(0), statuses[:, (2, 4)].amax(0)
    return torch.stack([totals, longest], dim=1).flatten()
