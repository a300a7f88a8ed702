"""Owners that are near: against a plain rule, within the balance, and by the bytes of a model."""

from __future__ import annotations

import functools
import itertools
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import funshampoo as fs
from funshampoo.distributed import parts
from funshampoo.distributed.ownership import NODE, nearest
from funshampoo.distributed.parts import nodes_of
from funshampoo.plan.shapes import model_shapes
from funshampoo.plan.sharding import plan_sharded
from tests.distributed.problems import optimizer, train, tree
from tests.distributed.ranks import Ranks

Held = Sequence[Mapping[int, int]]


def same(shares: Mapping[int, int], nodes: Sequence[int], rank: int) -> int:
    return sum(count for r, count in shares.items() if nodes[r] == nodes[rank])


def limit(costs: Sequence[float], nodes: Sequence[int]) -> float:
    return 1.05 * max(sum(costs) / len(nodes), max(costs))


def loads_of(costs: Sequence[float], owners: Sequence[int], size: int) -> list[float]:
    loads = [0.0] * size
    for block in sorted(range(len(costs)), key=lambda b: -costs[b]):
        loads[owners[block]] += costs[block]
    return loads


def kept(owners: Sequence[int], held: Held, nodes: Sequence[int]) -> int:
    return sum(h.get(r, 0) + NODE * same(h, nodes, r) for r, h in zip(owners, held))


def near(shares: Mapping[int, int], nodes: Sequence[int], rank: int, weight: int) -> int:
    own = shares.get(rank, 0)
    return own and own + weight * same(shares, nodes, rank)


def one_try(
    costs: Sequence[float], held: Held, nodes: Sequence[int], weight: int, eager: bool
) -> list[int]:
    """The rule in words: every rank is asked, for every block, every time."""
    ranks = range(len(nodes))
    loads, owners = [0.0] * len(nodes), [-1] * len(costs)

    def most(block: int) -> int:
        return max(near(held[block], nodes, rank, weight) for rank in ranks) if eager else 0

    def place(block: int, rank: int) -> tuple[float, ...]:
        here = near(held[block], nodes, rank, weight)
        inside = same(held[block], nodes, rank)
        if loads[rank] + costs[block] > limit(costs, nodes):
            return 3, 0, 0, loads[rank], rank
        if here:
            return 0, -here, 0, loads[rank], rank
        return (1, -inside, nodes[rank], loads[rank], rank) if inside else (2, 0, 0, loads[rank], 0)

    for block in sorted(range(len(costs)), key=lambda b: (-costs[b], -most(b))):
        owners[block] = min(ranks, key=functools.partial(place, block))
        loads[owners[block]] += costs[block]
    return owners


def plainly(costs: Sequence[float], held: Held, nodes: Sequence[int]) -> list[int]:
    """The best of four: by balance beyond the limit, by what is kept, by balance."""
    tries = []
    for weight, eager in itertools.product((0, NODE), (False, True)):
        owners = one_try(costs, held, nodes, weight, eager)
        largest = max(loads_of(costs, owners, len(nodes)))
        over = max(largest, limit(costs, nodes))
        tries.append((over, -kept(owners, held, nodes), largest, owners))
    return min(tries, key=lambda found: found[:3])[3]


@st.composite
def problems(draw: Any) -> tuple[list[float], list[dict[int, int]], list[int]]:
    """Costs of a few kinds, shares of a few ranks, and nodes of any sizes in any order."""
    nodes = draw(st.lists(st.integers(0, 2), min_size=1, max_size=7))
    ranks = st.integers(0, len(nodes) - 1)
    shares = draw(
        st.lists(st.dictionaries(ranks, st.integers(1, 9), max_size=4), min_size=1, max_size=25)
    )
    costs = [draw(st.sampled_from([0.5, 1.0, 4.0, 7.25])) for _ in shares]
    return costs, shares, nodes


@settings(deadline=None)
@given(problems())
@example(([0.5] * 3, [{0: 2}, {0: 2}, {0: 1, 1: 2}], [0, 0]))  # of one node, too
def test_owners_are_those_of_the_plain_rule(problem: Any) -> None:
    costs, held, nodes = problem
    assert nearest(costs, held, nodes) == plainly(costs, held, nodes)


@given(problems())
def test_owners_stay_within_the_balance_that_blocks_allow(problem: Any) -> None:
    costs, held, nodes = problem
    loads = loads_of(costs, nearest(costs, held, nodes), len(nodes))
    # Beyond the slack only as far as the last and least loaded rank had to go.
    assert max(loads) <= limit(costs, nodes) + max(costs)


def test_a_block_whose_holders_have_no_room_stays_on_their_node() -> None:
    """Nodes {0, 1} and {2, 3}. Without nodes it would go to rank 0, the first without work."""
    held = [{2: 9}, {2: 9}, {3: 9}, {0: 9}, {1: 1}, {3: 1}]
    costs = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    owners = nearest(costs, held, [0, 0, 1, 1])
    assert owners == [2, 3, 3, 0, 1, 0]
    inside = [same(h, [0, 0, 1, 1], r) for h, r in zip(held, owners)]
    assert inside == [9, 9, 9, 9, 1, 0]  # the cheapest is what moves: a node has work for four


def test_a_tie_between_ranks_is_decided_by_their_nodes() -> None:
    """Rank 4 has as much as rank 0, and more of the block around it."""
    held = [{0: 4, 1: 1, 4: 4, 5: 4}]
    assert nearest([1.0], held, [0, 0, 0, 0, 1, 1]) == [4]
    assert nearest([1.0], held, [0] * 6) == [0]


@pytest.mark.parametrize(
    ("block_size", "most", "balance"),
    [
        (256, 163.0, 1.047),  # 163.5 by ranks alone; none has less than 156.0
        (1024, 265.0, 1.23),  # 409.9 by ranks alone; none has less than 264.7
    ],
)
def test_what_crosses_nodes_in_gpt2(block_size: int, most: float, balance: float) -> None:
    """MiB a step and direction, all ranks together: FSDP2 over 64 ranks in nodes of 8."""
    tx = fs.shampoo(0.1, max_size=block_size)
    found = plan_sharded(model_shapes("gpt2"), "fsdp", (64,), transformation=tx)
    assert sum(found.gathered_across) == sum(found.scattered_across) <= most * 2**20
    assert found.balance <= balance
    alone = plan_sharded(model_shapes("gpt2"), "fsdp", (64,), transformation=tx, ranks_per_node=64)
    assert sum(found.gathered) <= 1.02 * sum(alone.gathered)  # between ranks, whatever the nodes


def test_gradients_of_a_replica_come_from_the_own_node() -> None:
    """Each node of 8 has a whole replica: nothing has to be asked of another one."""
    found = plan_sharded(model_shapes("gpt2"), "hsdp", (4, 8))
    assert sum(found.gathered) > 0
    assert sum(found.gathered_across) == 0
    assert sum(found.scattered_across) > 0


STEPS = range(1, 7)
HOSTS = {"in order": "aabb", "mixed": "abab", "apart": "abcd"}


def train_on_hosts(rank: int, hosts: str, replicas: int) -> tuple[Any, list[int], set[int]]:
    """The parameters, the nodes that were found, and from which nodes gradients came."""
    name, found = socket.gethostname, []

    def known(everyone: Any, nodes: Any = None) -> Any:
        found.append(held(everyone, nodes))
        return found[-1]

    held, routes, came = parts.Held, parts.find_routes, set()

    def looked(layout: Any, shards: Any, held: Any, shown: Any, rank: int) -> Any:
        both = routes(layout, shards, held, shown, rank)
        came.update(held.nodes[source] for source, own in enumerate(both.gather.into) if own)
        return both

    socket.gethostname = lambda: hosts[rank]
    parts.Held, parts.find_routes = known, looked  # type: ignore[misc, assignment]
    try:
        mesh = init_device_mesh("cpu", (replicas, len(hosts) // replicas))

        def placed(t: int) -> dict[str, Any]:
            return {
                n: distribute_tensor(x, mesh, [Replicate(), Shard(0) if x.ndim else Replicate()])
                for n, x in tree(t).items()
            }

        params, _ = train(optimizer({}), placed(0), STEPS, placed)
        whole = {n: x.full_tensor() for n, x in params.items()}
    finally:
        socket.gethostname = name
        parts.Held, parts.find_routes = held, routes  # type: ignore[misc]
    return whole, list(found[0].nodes), came


@pytest.mark.parametrize(
    ("hosts", "replicas"),
    [pytest.param("in order", 2, marks=pytest.mark.slow), ("mixed", 1), ("apart", 1)],
)
def test_ranks_on_several_hosts_have_the_numbers_of_one_process(
    ranks: Ranks, hosts: str, replicas: int
) -> None:
    expected, _ = train(optimizer(), tree(0), STEPS, tree)
    names = HOSTS[hosts]
    for rank, (found, nodes, came) in enumerate(ranks(4, train_on_hosts, names, replicas)):
        assert nodes == nodes_of(names)
        if replicas == 2:  # each host has a replica
            assert came <= {nodes[rank]}
        for name, x in expected.items():
            assert torch.equal(found[name], x), name
