"""Owners near the numbers: on a rank or node that holds much of a block, as far as work allows.

A schedule that moves the fewest bytes within a balance is an assignment problem with capacities,
which is NP-hard. Simple greedy rules come within a few per cent of what is possible, but which one
does depends on the shapes; they are fast, so all are tried, and the best one counts.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

NODE = 8
"""What a number is worth on the owner's node, beside one on the owner itself: links within a node
carry nine times as much (NVLink 450 GB/s beside 50 GB/s of network for each GPU)."""

Shares: TypeAlias = Mapping[int, int]  # {rank: how many numbers of a block it holds}


def nearest(
    costs: Sequence[float], held: Sequence[Shares], nodes: Sequence[int], slack: float = 0.05
) -> list[int]:
    """The rank of every block: one that is near to its numbers, as long as ranks stay balanced.

    Dearest block first, each to one of those ranks whose load stays below (1 + slack) max(Σ costs /
    ranks, max costs): of its holders the nearest; where none has room, the least loaded rank of
    the node that holds most of it; then of all. Where nobody has room, it is the least loaded.

    What is near: own + weight·same, numbers that the rank holds, and that ranks of its node hold.
    Tried are weights of 0 and `NODE`, blocks of equal cost in their order or those with the most to
    win first. Of the four the best is taken: first by balance, as far as it is beyond the limit,
    then by Σ own + `NODE`·same over all blocks and their owners, then by balance again.

    Args:
        costs: of every block, in any one unit.
        held: for every block {rank: how many of its numbers it holds}, without those who hold
            nothing; {} where all hold the same. Blocks that are held alike share an object.
        nodes: the node of every rank.
        slack: how much more than its share a rank may have to do.

    >>> nearest([1.0, 1.0, 1.0, 1.0], [{1: 5}, {1: 5, 0: 1}, {1: 9}, {}], nodes=[0, 0])
    [1, 0, 1, 0]
    >>> nearest([1.0] * 4, [{0: 9}, {0: 9}, {3: 9}, {3: 9}], nodes=[0, 0, 1, 1])
    [0, 1, 3, 2]
    """
    share = sum(costs) / len(nodes)
    limit = (1 + slack) * max(share, max(costs, default=0.0))
    weights = (0, NODE) if len(set(nodes)) > 1 else (0,)
    tries = []
    for weight, eager in itertools.product(weights, (False, True)):
        tries.append(_greedy(costs, held, nodes, limit, weight, eager))
    return max(tries, key=lambda found: found.merit).owners


class _Found(NamedTuple):
    owners: list[int]
    merit: tuple[float, int, float]


class _Near(NamedTuple):
    """Where a block would be near.

    Attributes:
        groups: ranks, each group nearer than the next one, and ascending.
        most: how near the first one is.
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


def _greedy(
    costs: Sequence[float],
    held: Sequence[Shares],
    nodes: Sequence[int],
    limit: float,
    weight: int,
    eager: bool,
) -> _Found:
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    alike = {id(shares): shares for shares in held}
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
            while heap[0][0] != loads[heap[0][1]]:  # that rank has got something since
                heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
            owner = heap[0][1]
        owners[block] = owner
        loads[owner] += cost
        kept += held[block].get(owner, 0) + NODE * near[block].same.get(nodes[owner], 0)
    largest = max(loads)
    return _Found(owners, (-max(largest, limit), kept, -largest))
