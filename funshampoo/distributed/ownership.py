"""Which rank owns which block, balanced by modelled cost: the same on every rank.

It takes no communication: every rank computes the same from the same shapes. Parameters that all
ranks have are scheduled by cost; if each rank has a part, a block goes near its numbers, to a rank
or node that holds much of it, as far as balance allows.

The schedule that moves the fewest bytes within a balance is an assignment problem with capacities,
which is NP-hard. Simple greedy rules come within a few per cent of the optimum, but which one does
depends on the shapes; they are fast, so all are tried, and the best result is used.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from funshampoo.blocks.layout import Stack
from funshampoo.core.checks import check_count
from funshampoo.core.contract import GradientTransformation
from funshampoo.distributed.cost import DEFAULT_COST, CostModel
from funshampoo.state.nodes import walk
from funshampoo.state.places import block_of
from funshampoo.state.stages import RefreshedState


class Work(NamedTuple):
    """The work of a step on one block, besides passing over it.

    Attributes:
        sides: lengths of the sides that are refreshed.
        flops: of the products, as the stages declare them.
        refresh_cost: per matrix, relative to the default solver, as the stages declare it.
    """

    sides: tuple[int, ...]
    flops: float
    refresh_cost: float = 1.0


Works: TypeAlias = Mapping[str, Work]
"""{stack: the work on one of its blocks}; a missing stack has Shampoo's, on all sides."""


def longest_processing_time(costs: Sequence[float], world_size: int) -> list[int]:
    """The rank of every job: most expensive job first, each to the least loaded rank.

    The largest load is at most 4/3 - 1/(3·world_size) times the smallest possible. Of equal jobs
    the first goes first, of equal loads the lowest rank wins; loads are sums of Python floats in
    that order. So the result depends only on the arguments.

    Args:
        costs: of every job, in any common unit.
        world_size: number of ranks.

    Raises:
        ValueError: a cost that is negative or not finite; world_size below 1.
        TypeError: world_size is not an int.

    Reference: Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).

    >>> longest_processing_time([1.0, 5.0, 2.0, 3.0], world_size=2)
    [0, 0, 1, 1]
    """
    check_count("world_size", world_size)
    for job, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise ValueError(f"costs[{job}] is {cost}; it must be a finite number of at least 0.")
    owners = [0] * len(costs)
    ranks = [(0.0, rank) for rank in range(world_size)]  # ascending, hence a heap
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):  # stable: ties by index
        load, rank = ranks[0]
        owners[job] = rank
        heapq.heapreplace(ranks, (load + costs[job], rank))
    return owners


def owners_of(
    stacks: Mapping[str, Stack],
    world_size: int,
    every: int,
    cost: CostModel = DEFAULT_COST,
    works: Works | None = None,
) -> dict[str, tuple[int, ...]]:
    """The owner of every row of every stack, balanced by modelled cost over all stacks.

    Blocks of a stack are alike, so the owners are assigned to a stack's rows in ascending order:
    the rows of one owner are consecutive, one slice to copy. This is host work for `init`, which
    torch.compile can't trace.

    Args:
        stacks: as in `Layout.stacks`, in the same order on every rank. Only `block` and `rows`
            matter.
        world_size: number of ranks.
        every: steps between two refreshes.
        cost: the model; the same on every rank.
        works: the work of a step, as returned by `works_of`.

    Returns:
        {name: one rank per row}.

    Raises:
        ValueError, TypeError: world_size or every is not an int of at least 1.

    >>> import torch
    >>> from funshampoo.blocks.layout import Stack
    >>> cpu = torch.device("cpu")
    >>> stacks = {
    ...     "64x64": Stack((64, 64), torch.float32, cpu, rows=5),
    ...     "8": Stack((8,), torch.float32, cpu, rows=2),
    ... }
    >>> owners_of(stacks, world_size=2, every=10)
    {'64x64': (0, 0, 0, 1, 1), '8': (1, 1)}
    """
    each = costs_of(stacks, every, cost, works)
    costs = [each[name] for name, stack in stacks.items() for _ in range(stack.rows)]
    ranks = iter(longest_processing_time(costs, world_size))
    return {
        name: tuple(sorted(itertools.islice(ranks, stack.rows))) for name, stack in stacks.items()
    }


def costs_of(
    stacks: Mapping[str, Stack], every: int, cost: CostModel, works: Works | None
) -> dict[str, float]:
    """{stack: the modelled seconds per step of one of its blocks}; see `owners_of`."""
    known = works or {}
    return {name: cost.block(s.block, every, *known.get(name, ())) for name, s in stacks.items()}


def works_of(
    transformation: GradientTransformation, blocks: Mapping[str, Sequence[int]], state: Any
) -> dict[str, Work]:
    """The work of a step of this transformation on a block of every stack.

    Args:
        transformation: in block space, or containing one that is; stages declare their products.
        blocks: {stack: shape of its blocks}.
        state: its state, which shows what is refreshed.

    >>> import torch
    >>> from funshampoo import muon
    >>> tx = muon(0.1, steps=5)
    >>> works_of(tx, {"2x3": (2, 3)}, tx.init({"w": torch.zeros(2, 3)}))
    {'2x3': Work(sides=(), flops=320.0, refresh_cost=1.0)}
    """
    kept, found = factor_sides(state), {}
    stated = transformation.refresh_cost
    for name, block in blocks.items():
        sides = kept.get(name, ())
        flops = transformation.flops(tuple(block), sides)
        found[name] = Work(sides, flops, 1.0 if stated is None else stated)
    return found


def factor_sides(state: Any) -> dict[str, tuple[int, ...]]:
    """The refreshed sides of every stack, from a state in block space.

    >>> import torch
    >>> from funshampoo import shampoo
    >>> factor_sides(shampoo(0.1).init({"w": torch.zeros(3, 2), "b": torch.zeros(3)}))
    {'3': (), '3x2': (3, 2)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for _, node in walk(state):
        if isinstance(node, RefreshedState):
            for stack, units in node.kept.items():
                own = tuple([d for d, unit in zip(block_of(stack), units) if unit])
                found[stack] = found.get(stack, ()) + own
    return found


NODE = 8
"""Weight of a number on the owner's node, relative to one on the owner itself: links within a node
are nine times as fast (NVLink 450 GB/s, compared with 50 GB/s of network for each GPU)."""

Shares: TypeAlias = Mapping[int, int]  # {rank: how many numbers of a block it holds}


def nearest(
    costs: Sequence[float], held: Sequence[Shares], nodes: Sequence[int], slack: float = 0.05
) -> list[int]:
    """The rank of every block: one near its elements, as long as ranks stay balanced.

    Most expensive block first, each to a rank whose load stays below (1 + slack) max(Σ costs /
    ranks, max costs): the nearest of its holders; if none has room, the least loaded rank of the
    node that holds most of it; then of all. If no rank has room, the least loaded one.

    Nearness is own + weight·same: the numbers that the rank holds, and that ranks of its node hold.
    It tries weights of 0 and `NODE`, and blocks of equal cost in order or with the most to gain
    first. Of the four results the best is used: first by balance, as far as it exceeds the limit,
    then by Σ own + `NODE`·same over all blocks and their owners, then by balance again.

    Args:
        costs: of every block, in any common unit.
        held: for every block {rank: how many of its numbers it holds}, without ranks that hold
            none; {} if all hold the same. Blocks that are held alike share an object.
        nodes: the node of every rank.
        slack: how much more than its share a rank may do, as a fraction.

    >>> nearest([1.0, 1.0, 1.0, 1.0], [{1: 5}, {1: 5, 0: 1}, {1: 9}, {}], nodes=[0, 0])
    [1, 0, 1, 0]
    >>> nearest([1.0] * 4, [{0: 9}, {0: 9}, {3: 9}, {3: 9}], nodes=[0, 0, 1, 1])
    [0, 1, 3, 2]
    """
    share = sum(costs) / len(nodes)
    limit = (1 + slack) * max(share, max(costs, default=0.0))
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    alike = {id(shares): shares for shares in held}

    def greedy(weight: int, eager: bool) -> tuple[list[int], tuple[float, int, float]]:
        """The owners, and how good that is."""
        known = {i: _near(shares, nodes, members, weight) for i, shares in alike.items()}
        near = [known[id(shares)] for shares in held]
        loads, owners = [0.0] * len(nodes), [0] * len(costs)
        heap = [(0.0, rank) for rank in range(len(nodes))]
        order = sorted(range(len(costs)), key=lambda b: (-costs[b], -near[b].most if eager else 0))
        kept = 0
        for block in order:
            cost = costs[block]
            for group in near[block].groups:
                owner = min(group, key=loads.__getitem__)
                if loads[owner] + cost <= limit:
                    break
            else:
                while heap[0][0] != loads[heap[0][1]]:  # that rank has received a block since
                    heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
                owner = heap[0][1]
            owners[block] = owner
            loads[owner] += cost
            kept += held[block].get(owner, 0) + NODE * near[block].same.get(nodes[owner], 0)
        largest = max(loads)
        return owners, (-max(largest, limit), kept, -largest)

    tries = [greedy(*how) for how in itertools.product((0, NODE), (False, True))]
    return max(tries, key=lambda found: found[1])[0]


class _Near(NamedTuple):
    """The places near a block's numbers.

    Attributes:
        groups: ranks; each group is nearer than the next, and ascending.
        most: how near the first group is.
        same: {node: how many numbers its ranks hold}.
    """

    groups: list[Sequence[int]]
    most: int
    same: dict[int, int]


def _near(
    held: Shares, nodes: Sequence[int], members: Mapping[int, Sequence[int]], weight: int
) -> _Near:
    same: dict[int, int] = {}
    for rank, count in held.items():
        same[nodes[rank]] = same.get(nodes[rank], 0) + count
    holders: dict[int, list[int]] = {}
    for rank in sorted(held):
        holders.setdefault(held[rank] + weight * same[nodes[rank]], []).append(rank)
    by_share = sorted(same, key=lambda node: (-same[node], node))
    groups = [holders[near] for near in sorted(holders, reverse=True)]
    return _Near([*groups, *[members[n] for n in by_share]], max(holders, default=0), same)
