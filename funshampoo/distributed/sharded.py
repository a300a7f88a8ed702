"""Share out the blocks over data-parallel ranks: each computes its own, and all receive them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.blocks.layout import Stack
from funshampoo.blocks.tiles import Tile, TileSize, Tiling
from funshampoo.combinators.guard import (
    failing_blocks,
    failure_limit_error,
    failure_report,
    limit_reached,
)
from funshampoo.core.checks import check_choice, check_count
from funshampoo.core.clock import read_counter
from funshampoo.core.contract import (
    GradientTransformation,
    Tree,
    any_refreshes,
    as_transformation,
    is_refresh,
)
from funshampoo.core.tree import check_parameters
from funshampoo.distributed.collectives import ProcessGroup, check_outside_transforms, rank_and_size
from funshampoo.distributed.cost import DEFAULT_COST, CostModel
from funshampoo.distributed.exchange import Exchange, Put
from funshampoo.distributed.shards import Shards, find_shards
from funshampoo.distributed.space import Space
from funshampoo.state.places import rows_of
from funshampoo.state.stages import GuardedState, ShardedState, find_state

_BY_SIZE = CostModel(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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
    where it has none (None), every rank's update is zero. An exception in `inner` on one rank is
    raised on every rank after the collective. On the CPU that is at once. Elsewhere looking waits
    for the device, so the other ranks look on multiples of `every` only; in between they apply
    zeros for the rank that failed and meet the group's timeout in their next collective. Errors of
    the caller on one rank alone (other shapes, other trees) are raised there before the collective:
    the others meet the timeout. A state that was donated to a failed step is spent: go on from a
    checkpoint.

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
            None keeps their own.
        cost: the model; by default the measured one in block space, sizes elsewhere. It has to be
            the same on every rank.

    State: `ShardedState`.

    Raises:
        ValueError, TypeError: an argument out of range; a process outside the group; a state that
            was made on other ranks.
        RuntimeError: inside a torch.func transform or torch.compile; updates that carry gradients;
            another rank failed.
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
    memory: dict[Any, tuple[Tensor, Tensor]] = {}  # of donated steps, to be used again
    tilings: dict[Any, Tiling] = {}

    def shards_of(space: Space, size: int) -> Shards:
        model = cost or (DEFAULT_COST if space.in_blocks else _BY_SIZE)
        return find_shards(space.blocks, size, every, model, communication_dtype or space.dtype)

    def init(params: Tree, *, block_ndim: int = 0, **context: Any) -> ShardedState:
        check_parameters(params, "sharded")
        rank, size = rank_and_size(process_group)
        space = Space(params, block_ndim)
        own = space.everything() if size == 1 else shards_of(space, size).owned_by(rank)
        state = inner.init(space.select(params, own), block_ndim=block_ndim, **context)
        report = failure_report(state, space.device)
        return ShardedState(state, space.described(own), {f"{rank} of {size}": ()}, report)

    def update(
        updates: Tree,
        state: ShardedState,
        params: Tree = None,
        *,
        block_ndim: int = 0,
        donate: bool = False,
        layout: Mapping[str, Any] | None = None,
        absent: Mapping[str, Collection[int]] | None = None,
        stacks: Mapping[str, Stack] | None = None,
        tile: TileSize = None,
        pieces: bool = False,
        **context: Any,
    ) -> tuple[Tree, ShardedState]:
        rank, size = rank_and_size(process_group)
        if size > 1:
            check_outside_transforms("sharded")
        space = Space(updates if params is None else params, block_ndim, stacks)
        shards = None if size == 1 else shards_of(space, size)
        own = space.everything() if shards is None else shards.owned_by(rank)
        context |= {"block_ndim": block_ndim, "donate": donate, "stops": False}

        def step(put: Put) -> tuple[Tree, Any]:
            # Whatever is wrong on this rank alone has to be found in here: the others are waiting.
            _check_owned(space.described(own), {f"{rank} of {size}": ()}, state)
            here = context | space.selected_context(context, own)
            mine, my_params = space.select(updates, own), None
            if params is not None:
                my_params = space.select(params, own)
            if pieces:
                tiling = _tiling_of(mine, tile, is_refresh(inner, state.inner, context), tilings)
                return {}, _update_tiles(inner, mine, state.inner, my_params, here, put, tiling)
            out, new = inner.update(mine, state.inner, my_params, **here)
            out = space.without(out, absent or {}, own)
            found = space.own_updates(out)
            for name in own:
                put(name, 0, found[name])
            return out, new

        number = _number(state, context.get("step"))
        look = number is None or number % every == 0
        if max_failures is not None and look:
            _stop_at(max_failures, state, layout or {}, process_group, size)
        if shards is None:
            found: dict[str, list[Any]] = {}
            out, new = step(lambda name, first, x: found.setdefault(name, []).append((first, x)))
            out = found if pieces else out
            report = failure_report(new, space.device)
        else:
            key = space.device, communication_dtype or space.dtype, shards.length * size
            exchange = Exchange(shards, rank, process_group, key, memory if donate else {})
            full, new, report = exchange.run(step, look or space.device.type == "cpu")
            out = full if pieces else space.rebuilt(full)
        return out, ShardedState(new, state.owned, state.ranks, report)

    refreshes = any_refreshes({"inner": inner})
    return GradientTransformation(init, update, name=inner.name, refreshes=refreshes)


def _number(state: ShardedState, step: int | None) -> int | None:
    """The number of this step, from 1: as given, or as a `guarded` inside counts; else None."""
    guard = find_state(state.inner, GuardedState)
    if step is not None or guard is None:
        return step
    done = read_counter(guard.steps)
    return None if done is None else done + 1


def _check_owned(own: Mapping[str, Any], ranks: Mapping[str, Any], state: ShardedState) -> None:
    if own != state.owned or ranks != state.ranks:
        raise ValueError(
            "sharded: the state holds other blocks than this rank owns. Call init on the ranks "
            "that train; to go on from a checkpoint of other ranks, use "
            "funshampoo.state.load_state_dict(tx.init(params), saved)."
        )


def _tiling_of(
    mine: Mapping[str, Tensor], size: TileSize, refresh: bool, known: dict[Any, Tiling]
) -> Tiling:
    key = size, refresh, *[(name, x.shape) for name, x in mine.items()]
    if key not in known:
        blocks = {name: (tuple(x.shape[1:]), len(x)) for name, x in mine.items()}
        device = next((x.device for x in mine.values()), torch.device("cpu"))
        known[key] = Tiling(blocks, size, device, refresh=refresh)
    return known[key]


def _update_tiles(
    inner: GradientTransformation,
    mine: dict[str, Tensor],
    state: Any,
    params: dict[str, Tensor] | None,
    context: Mapping[str, Any],
    put: Put,
    tiling: Tiling,
) -> Any:
    """A donated step of this rank's blocks, tile by tile. Returns the new state."""
    ids = context["block_ids"]

    def update(tile: Tile, part: Any, first: bool) -> tuple[dict[str, Tensor], Any]:
        def rows_of(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: stacks[name].narrow(0, r.start, len(r)) for name, r in tile.items()}

        own_ids = {name: ids[name][r.start : r.stop] for name, r in tile.items()}
        here = {**context, "gradient": rows_of(context["gradient"]), "block_ids": own_ids}
        shown = None if params is None else rows_of(params)
        found: tuple[dict[str, Tensor], Any] = inner.update(rows_of(mine), part, shown, **here)
        return found

    def put_all(tile: Tile, updates: dict[str, Tensor]) -> None:
        for name, rows in tile.items():
            put(name, rows.start, updates[name])

    return tiling.run(update, put_all, state)


def _stop_at(
    max_failures: int,
    state: ShardedState,
    layout: Mapping[str, Any],
    group: ProcessGroup | None,
    size: int,
) -> None:
    """Raise on every rank where a streak on one of them has reached the limit."""
    if not limit_reached(state.report, max_failures):
        return
    rows = {stack: rows_of(spans) for stack, spans in state.owned.items()} if layout else {}
    blocks = failing_blocks(state.inner, max_failures, layout, rows)
    if size > 1:  # all ranks are here: what they gathered is the same
        everywhere: list[Any] = [None] * size
        dist.all_gather_object(everywhere, blocks, group=group)
        blocks = [block for found in everywhere for block in found]
    raise failure_limit_error(blocks, max_failures)
