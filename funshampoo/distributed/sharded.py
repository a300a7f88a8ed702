"""Share out the blocks over data-parallel ranks: each computes its own, and all receive them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.executor import Leaves, Put
from funshampoo.blocks.layout import Layout
from funshampoo.combinators.failures import (
    failing_blocks,
    failure_limit_error,
    failure_report,
    limit_reached,
)
from funshampoo.core.checks import check_choice, check_count
from funshampoo.core.clock import advanced, look_due, running, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation, checked_pair
from funshampoo.core.tree import check_local, flatten
from funshampoo.distributed.agreement import Agreement, said
from funshampoo.distributed.collectives import (
    ProcessGroup,
    check_outside_transforms,
    gathered_objects,
    rank_and_size,
)
from funshampoo.distributed.cost import BY_SIZE, DEFAULT_COST, CostModel
from funshampoo.distributed.exchange import Exchange, Says
from funshampoo.distributed.overflow import holding
from funshampoo.distributed.ownership import Works, works_of
from funshampoo.distributed.shards import Blocks, Piece, Shards, find_shards
from funshampoo.distributed.space import Space, described
from funshampoo.state.stages import ShardedState


def sharded(
    inner: GradientTransformation,
    process_group: ProcessGroup | None = None,
    *,
    every: int = 10,
    max_failures: int | None = 20,
    communication_dtype: torch.dtype | None = None,
    cost: CostModel | None = None,
) -> GradientTransformation:
    """Run `inner` on the blocks that this rank owns, and bring the updates of all ranks together.

    Inside `blocked` the unit is a block, elsewhere a leaf: sharded(scale_by_adam()) is ZeRO-1. An
    owner is found for every block by longest processing time first, on modelled cost; its state
    exists on its owner alone. One all_gather_into_tensor a step brings the updates together. All
    ranks end with the same bits, which are those of a run on one rank (in float32 on a CPU).

    The gradients have to be the same on all ranks: average them first, as DistributedDataParallel
    does. Whether a block's gradient is finite, or there at all, is its owner's verdict for all:
    where it has none (None), every rank's update is zero.

    All else has to be the same too. Before their first step with these parameters the ranks compare
    names, shapes and dtypes of the parameters, their order and that of the gradients (by their
    values; parameters of other values are only warned of), the step, live numbers, the chain and
    its numbers, and the arguments here, by one more collective of six integers; on every step, in
    the status that travels with the updates, live numbers and the step. Where something differs
    every rank's error says what, and on which rank. A live number that is a tensor on a device is
    not read, and of a function of yours only the name is compared.

    An exception in `inner` on one rank, Ctrl-C too, is raised there after the collective, and an
    error that names the rank on the others. On the CPU that is at once. Elsewhere looking waits for
    the device, so they look on multiples of `every` only; in between they apply zeros for the rank
    that failed and meet the group's timeout in their next collective. Errors of the caller on one
    rank alone (other trees, a sparse gradient) are raised there before the collective: the others
    meet the timeout. So they do where only some of the ranks step other parameters than before, or
    end earlier (`distributed.join` is for uneven inputs); the error then lists what it may be. A
    state that was donated to a failed step is spent: go on from a checkpoint.

    Args:
        inner: any transformation that treats blocks (leaves) one by one; in `shampoo` it is all
            that runs inside `blocked`. Without torch.distributed it just runs.
        process_group: the ranks that share; by default all. With one group a node, state is
            sharded within the node and replicated across nodes.
        every: steps between two refreshes, over which the model spreads the cost of roots, and
            between two looks at the counters of failures.
        max_failures: as in `guarded`, for all ranks together, and in its place: a `guarded` inside
            counts and does not stop.
        communication_dtype: what updates are rounded to for the way: float32, bfloat16, float16;
            None keeps their own. A block whose update is not finite after that is not moved, and
            counted as held by a `guarded` inside; its averages have gone on.
        cost: the model; by default the measured one in block space, sizes elsewhere. It has to be
            the same on every rank. What is refreshed is read off the state that `inner` has for a
            block, made of meta tensors; products are what its stages state (`flops` of
            `GradientTransformation`).

    State: `ShardedState`.

    Raises:
        ValueError, TypeError: an argument out of range; a process outside the group; a state that
            was made on other ranks; parameters of FSDP, which are parts.
        RuntimeError: inside a torch.func transform or torch.compile; updates that carry gradients;
            another rank failed, does not come, or does something else.
        FailureLimitError: after `max_failures` in a row, on every rank.

    Reference: Shi et al., arXiv 2309.06497; Rajbhandari et al., arXiv 1910.02054 (ZeRO).

    >>> import torch
    >>> from funshampoo import scale_by_adam
    >>> tx = sharded(scale_by_adam())
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([5.0, -1.0])}, tx.init(params))[0]  # one process: as it is
    {'w': tensor([ 1., -1.])}
    """
    inner = as_transformation(inner)
    check_count("every", every)
    if max_failures is not None:
        check_count("max_failures", max_failures)
    check_choice(
        "communication_dtype",
        communication_dtype,
        (None, torch.float32, torch.bfloat16, torch.float16),
    )
    options = {"every": every, "max_failures": max_failures, "cost": cost}
    agreement = Agreement(inner, {**options, "communication_dtype": communication_dtype})
    ranks = _Ranks(inner, process_group, every, communication_dtype, cost, agreement)
    counts = inner.counts or max_failures is not None

    def init(
        params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> ShardedState:
        check_local(params, "sharded")
        rank, size = rank_and_size(process_group)
        space = Space(params, block_ndim)
        own = ranks.own(space.all_blocks)
        context |= {"block_ndim": block_ndim, "clock": clock or counts}
        state = inner.init(space.select(params, own), **context)
        report = failure_report(state, space.device)
        names = {f"{rank} of {size}": ()}
        return ShardedState(state, described(own, space), names, report, started(counts, clock))

    def update(
        updates: Tree, state: ShardedState, params: Tree, context: Context
    ) -> tuple[Tree, ShardedState]:
        """Outside of `blocked`, or somewhere in it: `blocked` itself goes by `spread`."""
        space = Space(updates if params is None else params, context.block_ndim)
        own = ranks.own(space.all_blocks)
        inside = space.selected_context(running(state.steps, context), own)
        found: dict[str, list[tuple[int, Tensor]]] = {}
        alone: list[Tree] = []

        def step(part: Any, put: Put) -> Any:
            mine, my_params = space.select(updates, own), None
            if params is not None:
                my_params = space.select(params, own)
            out, new = checked_pair(inner.run(mine, part, my_params, inside), inner.name)
            alone.append(out)
            for name, x in space.own_updates(out, own).items():
                put(name, own[name].all_rows, x)  # None: zeros
            return new

        def collect(name: str, rows: range, x: Tensor) -> None:
            found.setdefault(name, []).append((rows.start, x))

        known = None if params is None else flatten(params)[0]
        leaves = Leaves(space.names, known, flatten(updates)[0], space.all_blocks.stacks)
        new = ranks.step(step, collect, state, space.all_blocks, inside, leaves, absent=False)
        _, size = rank_and_size(process_group)
        return alone[0] if size == 1 else space.rebuilt(found), new

    def check(state: ShardedState, context: Context) -> None:
        if max_failures is None or not look_due(state.steps, context, every):
            return
        if limit_reached(state.report, max_failures):
            blocks = ranks.everywhere(failing_blocks(state, max_failures))
            raise failure_limit_error(blocks, max_failures, ranks.everywhere)

    return GradientTransformation(
        init,
        update,
        inner.name,
        check=check,
        parts={"inner": inner},
        counts=counts,
        spread=ranks,
    )


@dataclass(frozen=True)
class _Ranks:
    """Who owns what, and the step of this rank among the others; a `Spread`."""

    inner: GradientTransformation
    group: ProcessGroup | None
    every: int
    communication_dtype: torch.dtype | None
    cost: CostModel | None
    agreement: Agreement
    memory: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of donated steps
    known_works: dict[Any, Works] = field(default_factory=dict)

    def shards(self, blocks: Blocks) -> Shards | None:
        """The shards of all ranks; None for one rank."""
        _, size = rank_and_size(self.group)
        if size == 1:
            return None
        check_outside_transforms("sharded")
        model = self.cost or (DEFAULT_COST if blocks.in_blocks else BY_SIZE)
        works = self._works(blocks) if blocks.in_blocks else {}
        return find_shards(blocks.stacks, size, self.every, model, self._dtype(blocks), works)

    def _works(self, blocks: Blocks) -> Works:
        key = tuple(blocks.stacks.items())
        if key not in self.known_works:
            shapes = {name: stack.block for name, stack in blocks.stacks.items()}
            like = {n: torch.empty(1, *block, device="meta") for n, block in shapes.items()}
            state = self.inner.init(like, block_ndim=1)
            self.known_works[key] = works_of(self.inner, shapes, state)
        return self.known_works[key]

    def _dtype(self, blocks: Blocks) -> torch.dtype:
        return self.communication_dtype or blocks.dtype

    def is_shared(self) -> bool:
        """See `Spread`."""
        return rank_and_size(self.group)[1] > 1

    def own(self, blocks: Blocks) -> dict[str, Piece]:
        """{stack: the rows of this rank}."""
        shards = self.shards(blocks)
        if shards is not None:
            return shards.owned_by(rank_and_size(self.group)[0])
        return {name: Piece(name, 0, s.rows, 0) for name, s in blocks.stacks.items()}

    def owned(self, layout: Layout) -> dict[str, range]:
        """The rows of this rank, without the stacks of which it has none."""
        return {name: piece.all_rows for name, piece in self.own(Blocks.of(layout)).items()}

    def exchange(
        self,
        step: Callable[[Any, Put], Any],
        put: Put,
        state: ShardedState,
        layout: Layout,
        context: Context,
        leaves: Leaves,
        absent: bool,
    ) -> ShardedState:
        """See `Spread`."""
        return self.step(step, put, state, Blocks.of(layout), context, leaves, absent)

    def step(
        self,
        step: Callable[[Any, Put], Any],
        put: Put,
        state: ShardedState,
        blocks: Blocks,
        context: Context,
        leaves: Leaves,
        absent: bool,
    ) -> ShardedState:
        """One step of this rank, and what all ranks found to `put`."""
        rank, size = rank_and_size(self.group)
        own, number = self.own(blocks), context.step

        def mine(place: Put) -> Any:
            # Whatever is wrong on this rank alone has to be found in here: the others are waiting.
            _check_owned(described(own, blocks), {f"{rank} of {size}": ()}, state)
            return step(state.inner, place)

        # Streaks are looked at before the steps that are multiples of `every`.
        due = number is None or (number + 1) % self.every == 0
        shards = self.shards(blocks)
        if shards is None:
            steps = advanced(state.steps, context.donate)
            new = mine(put)
            report = failure_report(new, blocks.device) if due else state.report
            return ShardedState(new, state.owned, state.ranks, report, steps)
        says = self._says(shards, leaves, context, blocks.device)
        steps = advanced(state.steps, context.donate)
        dtype = self._dtype(blocks)
        memory = self.memory if context.donate else {}
        key = blocks.device, dtype, shards.length * size
        exchange = Exchange(shards, rank, self.group, key, memory)
        if absent:
            exchange.shard.zero_()
        if dtype != blocks.dtype:
            step = holding(step, exchange.sent, exchange.places)
        look = blocks.device.type == "cpu" or number is None or number % self.every == 0
        pieces, new, seen = exchange.run(mine, due, look, says)
        for name, found in pieces.items():
            for first, x in found:
                put(name, range(first, first + len(x)), x)
        report = state.report if seen is None else seen
        return ShardedState(new, state.owned, state.ranks, report, steps)

    def _says(self, shards: Shards, leaves: Leaves, context: Context, device: torch.device) -> Says:
        """What has to be the same on all ranks. On their first step they agree on it here."""
        agreement = self.agreement
        plan = agreement.on(shards, leaves, context, self.group, device)
        return Says(
            agreement.now(plan, context),
            context.step or 0,
            lambda: [*agreement.lines, *said(context)],
        )

    def everywhere(self, blocks: list[str]) -> list[str]:
        """What all ranks say: all of them are here, since what they gathered is the same."""
        _, size = rank_and_size(self.group)
        if size == 1:
            return blocks
        return [block for part in gathered_objects(blocks, self.group) for block in part]


def _check_owned(own: Mapping[str, Any], ranks: Mapping[str, Any], state: ShardedState) -> None:
    if own != state.owned or ranks != state.ranks:
        raise ValueError(
            "sharded: the state holds other blocks than this rank owns. Call init on the ranks "
            "that train; to go on from a checkpoint of other ranks, use "
            "funshampoo.state.load_state_dict(tx.init(params), saved)."
        )
