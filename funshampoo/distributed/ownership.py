"""Which rank owns which block: a schedule of the blocks' modelled cost, the same on every rank.

It takes no communication: every rank computes the same from the same shapes.
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
    """What a step does to one block beside passing over it.

    Attributes:
        sides: lengths of those for which something is refreshed.
        flops: operations of the products, as the stages state them.
        refresh_cost: of one matrix, in the time of the default solver, as the stages state it.
    """

    sides: tuple[int, ...]
    flops: float
    refresh_cost: float = 1.0


Works: TypeAlias = Mapping[str, Work]
"""{stack: the work on one of its blocks}; of a stack that is not in it, Shampoo's on all sides."""


def longest_processing_time(costs: Sequence[float], world_size: int) -> list[int]:
    """The rank of every job: dearest job first, each to the rank with the least to do so far.

    The largest load is at most 4/3 - 1/(3·world_size) times the smallest possible. Of equal jobs
    the first goes first, of equal loads the lowest rank wins; loads are sums of Python floats in
    that order. So the result depends on nothing but the arguments.

    Args:
        costs: of every job, in any one unit.
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
    """The owner of every row of every stack, balanced by modelled cost over all stacks together.

    Blocks of a stack are alike, so each stack's owners are given to its rows in ascending order:
    the rows of one owner are consecutive, one slice to copy. It is host work for
    `init`: torch.compile can't trace it.

    Args:
        stacks: as in `Layout.stacks`, in an order that is the same on every rank. Only `block` and
            `rows` count.
        world_size: number of ranks.
        every: steps between two refreshes.
        cost: the model; the same on every rank.
        works: what a step does, as `works_of` finds it.

    Returns:
        {name: one rank a row}.

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
    check_count("world_size", world_size)
    check_count("every", every)
    known, costs = works or {}, list[float]()
    for name, stack in stacks.items():
        costs += [cost.block(stack.block, every, *known.get(name, ()))] * stack.rows
    ranks = iter(longest_processing_time(costs, world_size))
    return {
        name: tuple(sorted(itertools.islice(ranks, stack.rows))) for name, stack in stacks.items()
    }


def works_of(
    transformation: GradientTransformation, blocks: Mapping[str, Sequence[int]], state: Any
) -> dict[str, Work]:
    """The work of a step of this transformation on a block of every stack.

    Args:
        transformation: what runs in block space, or what contains it: stages state their products.
        blocks: {stack: shape of its blocks}.
        state: its state, which says what is refreshed.

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
    """The sides of every stack for which something is refreshed, from a state in block space.

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
