"""Share out the blocks over data-parallel ranks: each computes its own, and all receive them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.base import GradientTransformation, Tree, as_transformation
from funshampoo.checks import check_choice, check_count
from funshampoo.distributed.collectives import (
    ProcessGroup,
    all_gather_into,
    check_outside_transforms,
    rank_and_size,
)
from funshampoo.distributed.cost import DEFAULT_COST, CostModel
from funshampoo.distributed.shards import Blocks, Piece, Shards, find_shards, pack, unpack
from funshampoo.guard import (
    failing_blocks,
    failure_limit_error,
    failure_report,
    limit_reached,
)
from funshampoo.state.places import rows_of
from funshampoo.state.stages import GuardedState, ShardedState, find_state
from funshampoo.steps import read_counter
from funshampoo.transforms.layout import Stack
from funshampoo.tree import (
    MaskedNode,
    check_parameters,
    compute_dtype,
    flatten,
    leaf_names,
)

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
    buffers: dict[Any, Tensor] = {}  # of donated steps, to be used again

    def shards_of(space: _Space, size: int) -> Shards:
        model = cost or (DEFAULT_COST if space.in_blocks else _BY_SIZE)
        return find_shards(space.blocks, size, every, model, communication_dtype or space.dtype)

    def init(params: Tree, *, block_ndim: int = 0, **context: Any) -> ShardedState:
        check_parameters(params, "sharded")
        rank, size = rank_and_size(process_group)
        space = _Space(params, block_ndim)
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
        **context: Any,
    ) -> tuple[Tree, ShardedState]:
        rank, size = rank_and_size(process_group)
        if size > 1:
            check_outside_transforms("sharded")
        space = _Space(updates if params is None else params, block_ndim, stacks)
        shards = None if size == 1 else shards_of(space, size)
        own = space.everything() if shards is None else shards.owned_by(rank)
        context |= {"block_ndim": block_ndim, "donate": donate, "stops": False}

        def step() -> tuple[Tree, Any]:
            # Whatever is wrong on this rank alone has to be found in here: the others are waiting.
            _check_owned(space.described(own), {f"{rank} of {size}": ()}, state)
            here = context | space.selected_context(context, own)
            my_params = None if params is None else space.select(params, own)
            out, new = inner.update(space.select(updates, own), state.inner, my_params, **here)
            return space.without(out, absent or {}, own), new

        number = _number(state, context.get("step"))
        due = number is None or (number - 1) % every == 0
        if max_failures is not None and due:
            _stop_at(max_failures, state, layout or {}, process_group, size)
        if shards is None:
            out, new = step()
            report = failure_report(new, space.device)
        else:
            key = space.device, communication_dtype or space.dtype, shards.length * size
            buffer = buffers.pop(key, None) if donate else None
            exchange = _Exchange(shards, rank, process_group, key, buffer)
            look = space.device.type == "cpu" or number is None or number % every == 0
            out, new, report = exchange.run(step, space, look)
            if donate:
                buffers[key] = exchange.buffer
        return out, ShardedState(new, state.owned, state.ranks, report)

    return GradientTransformation(init, update, name=inner.name)


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


class _Space:
    """Stacks, or leaves as stacks of one row each: what they have in common.

    Args:
        tree: the stacks, or the tree of leaves.
        block_ndim: 1 for stacks.
        stacks: all stacks, where the tree holds nothing but this rank's rows already.
    """

    def __init__(
        self, tree: Tree, block_ndim: int, stacks: Mapping[str, Stack] | None = None
    ) -> None:
        self.in_blocks, self.cut = block_ndim > 0, stacks is not None
        leaves, self.spec = flatten(tree)
        if stacks is not None:
            self.names = list(stacks)
            self.blocks = {name: Blocks(s.block, s.rows) for name, s in stacks.items()}
            self._settle(
                {s.device for s in stacks.values()}, {n: s.dtype for n, s in stacks.items()}
            )
            return
        if self.in_blocks:
            self.names = list(tree)
            leaves = list(tree.values())
            self.blocks = {
                name: Blocks(tuple(x.shape[1:]), x.shape[0]) for name, x in zip(self.names, leaves)
            }
        else:
            self.names = leaf_names(tree)
            self.blocks = {
                name: Blocks(tuple(x.shape), 1) for name, x in self._present(leaves).items()
            }
        known = {n: x for n, x in zip(self.names, leaves) if isinstance(x, Tensor)}
        dtypes = {name: compute_dtype(x) for name, x in known.items()}
        self._settle({x.device for x in known.values()}, dtypes)

    def _settle(self, devices: set[torch.device], dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes
        self.dtype = torch.float64 if torch.float64 in dtypes.values() else torch.float32
        self.device = next(iter(devices), torch.device("cpu"))
        if len(devices) > 1:
            raise ValueError(
                "sharded: the parameters are on several devices; one buffer can't hold them. Use "
                "one sharded(...) a device, by partition(...)."
            )

    def _present(self, leaves: list[Any]) -> dict[str, Tensor]:
        for name, x in zip(self.names, leaves):
            if x is None:
                raise ValueError(
                    f"sharded: the gradient of '{name}' is None and its shape unknown: pass params "
                    "to update."
                )
        return dict(zip(self.names, leaves))

    def everything(self) -> dict[str, Piece]:
        """{stack: all its rows}."""
        return {stack: Piece(stack, 0, blocks.rows, 0) for stack, blocks in self.blocks.items()}

    def select(self, tree: Tree, own: Mapping[str, Piece]) -> Tree:
        """What this rank owns of a tree: views of rows; outside block space others are hidden."""
        if self.cut:
            return tree
        if self.in_blocks:
            return {s: tree[s].narrow(0, p.first, p.rows) for s, p in own.items()}
        leaves = self.spec.flatten_up_to(tree)
        shown = [x if n in own else MaskedNode() for n, x in zip(self.names, leaves)]
        return self.spec.unflatten(shown)

    def selected_context(
        self, context: Mapping[str, Any], own: Mapping[str, Piece]
    ) -> dict[str, Any]:
        """What of the context is a tree over the blocks."""
        selected: dict[str, Any] = {}
        if context.get("gradient") is not None:
            selected["gradient"] = self.select(context["gradient"], own)
        ids = context.get("block_ids")
        if ids is not None:
            selected["block_ids"] = {s: ids[s][p.first : p.first + p.rows] for s, p in own.items()}
        return selected

    def without(
        self, out: Tree, absent: Mapping[str, Collection[int]], own: Mapping[str, Piece]
    ) -> Tree:
        """The updates with zeros in the rows that had no gradient.

        Args:
            absent: {stack: rows of the full stack}.
        """
        if not self.in_blocks:
            return out  # there such an update is None already
        changed = dict(out)
        for stack, piece in own.items():
            rows = [
                r - piece.first for r in absent.get(stack, ()) if 0 <= r - piece.first < piece.rows
            ]
            if rows:
                index = torch.tensor(sorted(rows), device=out[stack].device)
                changed[stack] = out[stack].index_fill(0, index, 0.0)
        return changed

    def own_updates(self, out: Tree) -> dict[str, Tensor | None]:
        """{stack or leaf: update}, of those that this rank owns."""
        if self.in_blocks:
            return dict(out)
        return dict(zip(self.names, self.spec.flatten_up_to(out)))

    def rebuilt(self, full: Mapping[str, Tensor]) -> Tree:
        """The tree of all updates."""
        if self.in_blocks:
            return {name: full[name] for name in self.names}
        return self.spec.unflatten([full[n].view(self.blocks[n].block) for n in self.names])

    def described(self, own: Mapping[str, Piece]) -> dict[str, dict[str, tuple[()]]]:
        """`ShardedState.owned`."""
        if self.in_blocks:
            return {s: {f"{p.first}:{p.first + p.rows}": ()} for s, p in own.items()}
        return {n: {"owned" if n in own else "elsewhere": ()} for n in self.names}


class _Exchange:
    """One step of one rank: compute, gather, and tell the others if that failed."""

    def __init__(
        self,
        shards: Shards,
        rank: int,
        group: ProcessGroup | None,
        key: tuple[torch.device, torch.dtype, int],
        buffer: Tensor | None,
    ) -> None:
        self.shards, self.rank, self.group = shards, rank, group
        device, dtype, length = key
        self.buffer = torch.empty(length, dtype=dtype, device=device) if buffer is None else buffer

    def run(
        self, step: Callable[[], tuple[Tree, Any]], space: _Space, look: bool
    ) -> tuple[Tree, Any, Tensor]:
        """(updates of all ranks, state of this one, report on all)."""
        shards, failure, new = self.shards, None, None
        shard = torch.empty_like(self.buffer[: shards.length])
        status = shard.narrow(0, shards.length - shards.status, shards.status).view(torch.float32)
        status.zero_()
        status[5] = shards.fingerprint
        try:
            out, new = step()
            self._check_no_gradients(out)
            pack(shard, shards, self.rank, space.own_updates(out))
            status[1:5] = failure_report(new, shard.device)
        except Exception as error:  # whatever it is: the others are waiting in the collective
            failure = error
            shard[: shards.length - shards.status].zero_()
            status[0] = 1.0
        all_gather_into(self.buffer, shard, self.group)
        if failure is not None:
            raise failure
        full, statuses = unpack(self.buffer, shards, space.dtypes)
        if look:
            self._check(statuses)
        totals, longest = statuses[:, (1, 3)].sum(0), statuses[:, (2, 4)].amax(0)
        return space.rebuilt(full), new, torch.stack([totals, longest], dim=1).flatten()

    def _check(self, statuses: Tensor) -> None:
        """Raise what another rank has to say. Waits for the device."""
        failed, *_, fingerprints = statuses.T.tolist()
        if any(failed):
            raise RuntimeError(
                f"sharded: the optimizer step failed on rank {failed.index(1.0)} of {len(failed)}; "
                "its own error says why. No rank has applied the step."
            )
        if set(fingerprints) != {self.shards.fingerprint}:
            raise RuntimeError(
                "sharded: the ranks do not agree on who owns which block. Give all of them the "
                "same parameters in the same order, and the same every, cost, max_size and merge."
            )

    @staticmethod
    def _check_no_gradients(out: Tree) -> None:
        if any(isinstance(u, Tensor) and u.requires_grad for u in flatten(out)[0]):
            raise RuntimeError(
                "sharded: the updates require gradients, which end at the collective. Detach the "
                "gradients and the parameters that you pass to update, or differentiate through an "
                "optimizer that is not sharded."
            )


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
