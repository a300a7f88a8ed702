"""Sharding of blocks over data-parallel ranks: each steps its own, and all get the updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.blocking import shape_unknown
from funshampoo.blocks.executor import Leaves, Put
from funshampoo.blocks.layout import Stack
from funshampoo.combinators.failures import failing_blocks, failure_limit_error, limit_reached
from funshampoo.core.checks import check_choice, check_count, check_flag
from funshampoo.core.clock import look_due, running
from funshampoo.core.context import Context, changed, with_cut
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.parameters import check_local
from funshampoo.core.traits import refuse
from funshampoo.core.tree import MaskedNode, compute_dtype, flatten, leaf_names
from funshampoo.distributed.agreement import Agreement
from funshampoo.distributed.collectives import ProcessGroup
from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ranks import Ranks
from funshampoo.distributed.shards import Blocks
from funshampoo.state.stages import ShardedState

_SENT_AS = (None, torch.float32, torch.bfloat16, torch.float16)


def sharded(
    inner: GradientTransformation,
    process_group: ProcessGroup | None = None,
    *,
    every: int = 10,
    max_failures: int | None = 20,
    communication_dtype: torch.dtype | None = None,
    cost: CostModel | None = None,
    whole: bool = True,
    overlap: int = 1,
) -> GradientTransformation:
    """Run `inner` on the blocks that this rank owns, and exchange the updates of all ranks.

    Inside `blocked` the unit is a block, elsewhere a leaf: sharded(scale_by_adam()) is ZeRO-1.
    Every block gets an owner by longest processing time first, on modelled cost; its state exists
    on its owner only. One all_gather_into_tensor per step collects the updates. All ranks end with
    the same bits, which equal those of a run on one rank (in float32 on a CPU).

    The gradients must be the same on all ranks: average them first, as in DistributedDataParallel.
    A block's owner decides for all ranks whether its gradient is finite, or present at all: if it
    has none (None), every rank's update is zero. A DTensor's gradient must be missing on all ranks
    or on none.

    Everything else must be the same too. Before their first step with these parameters the ranks
    compare names, shapes and dtypes of the parameters, their order and that of the gradients (by
    value; parameters with different values only cause a warning), the step, live numbers, the chain
    and its numbers, and the arguments here, with one more collective of six integers. On every
    step, in the status sent with the updates, they compare live numbers, the step, the run that the
    state belongs to, and what the wrapper applies around the chain. If something differs, every
    rank's error says what, and on which rank. A live number that is a tensor on a device is not
    read, and your own functions are compared by name only.

    A rank that gets other parameters later, or another chain by an edit of the wrapper's groups,
    first takes part in one more step like the last one, to say so: if all do, they compare again;
    if not, all of them get the error, on the CPU before anything moves.

    An exception in `inner` on one rank, also Ctrl-C, is raised there after the collective, and the
    others raise an error that names the rank: on the CPU at once. On other devices, reading the
    status waits for the device, so ranks do it on multiples of `every` only; in between they apply
    zeros for the failed rank and run into the group's timeout in their next collective. Errors of
    the caller on one rank alone (other trees, a sparse gradient) are raised before the collective:
    the others run into the timeout. So they do if some ranks end earlier (`distributed.join` is for
    uneven inputs), or return to parameters on which all had agreed, as of a second model; the error
    lists possible causes. A state donated to a failed step is unusable: resume from a checkpoint.

    Args:
        inner: any transformation that treats blocks (leaves) separately; in `shampoo` it is
            everything inside `blocked`. Without torch.distributed it just runs.
        process_group: the ranks that share; by default all. With one group per node, state is
            sharded within the node and replicated across nodes.
        every: steps between two refreshes, over which the model spreads the cost of roots, and
            between two looks at the failure counters.
        max_failures: as in `guarded`, but for all ranks together, and in its place: a `guarded`
            inside counts and does not stop.
        communication_dtype: dtype to which updates are rounded for sending: float32, bfloat16,
            float16; None keeps their own. A block whose update is then not finite does not move,
            and counts as held by a `guarded` inside; its averages include the step.
        cost: the model; by default the measured one in block space, sizes elsewhere. It must be
            the same on every rank. The refreshed sides are taken from the state that `inner` makes
            for a block of meta tensors; products are declared by its stages (`flops` of
            `GradientTransformation`).
        whole: False shards only the blocks of DTensors, inside `blocked`; on parameters that every
            rank has whole, `inner` runs on every rank, as if without `sharded`.
        overlap: the number of portions, of about equal modelled work, in which the gradients of
            DTensors reach the owners: all but the first arrive while another one is computed.
            Results are the same with any. Each is one more collective, and cuts the stacks.

    State: `ShardedState`; with whole=False, and no DTensors, `inner`'s.

    Raises:
        ValueError: a stage in `inner` computes with all leaves together, as
            clip_by_global_norm and multi_steps (which goes around it); from init, outside of
            blocks, so does a `guarded` without by_leaf.
        ValueError, TypeError: an argument out of range; a process outside the group; a state made
            on other ranks; parameters of FSDP, which are parts.
        RuntimeError: inside a torch.func transform or torch.compile; updates that carry gradients;
            another rank failed, does not enter the collective, or does something else.
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
    alone = "a rank has its own blocks or leaves alone: put it before or behind sharded(...)."
    refuse(inner, "sharded", couples=alone)
    check_count("every", every)
    check_count("overlap", overlap)
    check_flag("whole", whole)
    if max_failures is not None:
        check_count("max_failures", max_failures)
    check_choice("communication_dtype", communication_dtype, _SENT_AS)
    options: dict[str, Any] = {"every": every, "max_failures": max_failures, "cost": cost}
    options |= {"communication_dtype": communication_dtype, "whole": whole, "overlap": overlap}
    agreement = Agreement(inner, process_group, options)
    counts = inner.counts or max_failures is not None
    ranks = Ranks(
        inner, process_group, every, communication_dtype, cost, agreement, whole, counts, overlap
    )

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any) -> Any:
        check_local(params, "sharded")
        if not block_ndim and whole:
            by_rank = "outside of blocks a rank would hold its own leaves: give by_leaf=True."
            refuse(inner, "sharded", judges=by_rank)
        if not whole:
            return inner.init(params, block_ndim=block_ndim, clock=clock, **context)
        space = Space(params, block_ndim)
        mine = ranks.own(space.blocks)
        own, owned = space.select(params, mine), space.blocks.described(mine)
        state = inner.init(own, block_ndim=block_ndim, clock=clock or counts, **context)
        return ranks.begun(state, owned, space.blocks.device, clock)

    def update(
        updates: Tree, state: ShardedState, params: Tree, context: Context
    ) -> tuple[Tree, ShardedState]:
        """Outside `blocked`, or nested in it: `blocked` itself uses `spread`."""
        if not whole:
            return inner.run(updates, state, params, context)
        return _stepped(ranks, updates, state, params, context)

    def check(state: Any, context: Context) -> None:
        if not isinstance(state, ShardedState):
            inner.check(state, context)
            return
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
        counts=counts if whole else inner.counts,
        spread=ranks,
    )


def _stepped(
    ranks: Ranks, updates: Tree, state: ShardedState, params: Tree, context: Context
) -> tuple[Tree, ShardedState]:
    """A step of the leaves or stacks that this rank owns; returns the updates of all ranks."""
    space = Space(updates if params is None else params, context.block_ndim)
    own = ranks.own(space.blocks)
    context = with_cut(context, updates, lambda tree: space.select(tree, own))
    inside = space.selected_context(running(state.steps, context), own)
    found: dict[str, list[Tensor]] = {}
    alone: list[Tree] = []

    def step(part: Any, own: Mapping[str, range], put: Put) -> Any:
        mine, my_params = space.select(updates, own), space.select(params, own)
        out, new = checked_pair(ranks.inner.run(mine, part, my_params, inside), ranks.inner.name)
        alone.append(out)
        for name, x in space.own_updates(out, own).items():
            put(name, range(len(own[name])), x)  # None: zeros
        return new

    def collect(name: str, rows: range, x: Tensor) -> None:
        found.setdefault(name, []).append(x)

    known = None if params is None else flatten(params)[0]
    leaves = Leaves(space.names, known, flatten(updates)[0], space.blocks)
    new = ranks.exchange(step, collect, state, inside, leaves, absent=False)
    return space.rebuilt(found) if ranks.is_shared() else alone[0], new


class Space:
    """Common interface of stacks, and of leaves as stacks of one row each.

    Args:
        tree: the stacks, or the tree of leaves.
        block_ndim: 1 for stacks.
    """

    def __init__(self, tree: Tree, block_ndim: int) -> None:
        in_blocks = block_ndim > 0
        leaves, self.spec = flatten(tree)
        self.names = list(tree) if in_blocks else leaf_names(tree)
        known = dict(zip(self.names, tree.values() if in_blocks else leaves))
        for name, x in known.items():
            if not isinstance(x, Tensor):
                raise shape_unknown(name)
        stacks = {
            name: Stack(
                tuple(x.shape[block_ndim:]),
                compute_dtype(x),
                x.device,
                x.shape[0] if in_blocks else 1,
            )
            for name, x in known.items()
        }
        self.blocks = Blocks.of(stacks, in_blocks)

    def select(self, tree: Tree, own: Mapping[str, range]) -> Tree:
        """This rank's part of a tree: views of rows; outside block space, other leaves are hidden.

        None stays None: there is no such tree.
        """
        if tree is None:
            return None
        if self.blocks.in_blocks:
            return {s: tree[s].narrow(0, r.start, len(r)) for s, r in own.items()}
        leaves = self.spec.flatten_up_to(tree)
        shown = [x if n in own else MaskedNode() for n, x in zip(self.names, leaves)]
        return self.spec.unflatten(shown)

    def selected_context(self, context: Context, own: Mapping[str, range]) -> Context:
        """The context, with its trees over the blocks cut to this rank's."""
        rows = context.rows
        if rows is not None:
            rows = {s: rows[s][r.start : r.stop] for s, r in own.items()}
        gradient, alive = self.select(context.gradient, own), self.select(context.alive, own)
        return changed(context, gradient=gradient, alive=alive, rows=rows)

    def own_updates(self, out: Tree, own: Mapping[str, range]) -> dict[str, Tensor | None]:
        """{stack or leaf: update}, for those that this rank owns."""
        if self.blocks.in_blocks:
            return dict(out)
        found = zip(self.names, self.spec.flatten_up_to(out))
        return {name: x for name, x in found if name in own}

    def rebuilt(self, pieces: Mapping[str, list[Tensor]]) -> Tree:
        """The tree of all updates, newly allocated, from every stack's pieces in row order."""
        full: dict[str, Tensor] = {}
        stacks = self.blocks.stacks
        for name, found in pieces.items():
            whole = torch.cat(found) if len(found) > 1 else found[0].clone()
            full[name] = whole.to(stacks[name].dtype)
        if self.blocks.in_blocks:
            return {name: full[name] for name in self.names}
        return self.spec.unflatten([full[n].view(stacks[n].block) for n in self.names])
