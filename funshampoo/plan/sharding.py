"""The cost of sharded parameters for each rank, planned in advance, by simulation."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.blocking import layout_in, shows_parameters
from funshampoo.blocks.layout import Layout
from funshampoo.core.boxes import Holding, Shape, holding_at
from funshampoo.core.checks import check_choice
from funshampoo.core.contract import GradientTransformation, as_transformation
from funshampoo.core.text import counted, duration, plural, readable
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.distributed.cost import DEFAULT_COST, CostModel
from funshampoo.distributed.ownership import costs_of
from funshampoo.distributed.parts import near_shards
from funshampoo.distributed.routes import Held, Shares, source_of
from funshampoo.distributed.shards import Shards
from funshampoo.plan.planner import Row, meta_parameters, spread_table
from funshampoo.plan.scopes import scopes_of
from funshampoo.recipes.shampoo import shampoo
from funshampoo.state.nodes import find_state
from funshampoo.state.places import Place as StatePlace
from funshampoo.state.places import map_tensors
from funshampoo.state.stages import BlockedState

Sharding: TypeAlias = Literal["fsdp", "hsdp", "tp", "fsdp+tp"]


class ShardingPlan(NamedTuple):
    """The result of `plan_sharded`; lists have one number per rank. `str` of it is a table.

    Attributes:
        mesh: its shape.
        blocks: how many a rank owns.
        seconds: modelled seconds per step for them.
        state_bytes: of its state, including state outside blocks.
        gathered: bytes of gradients (and parameters, if they are read) that it receives.
        gathered_across: the part of them from other nodes.
        scattered: bytes of updates that it receives.
        scattered_across: the part of them from other nodes.
        peers: the number of other ranks that it sends something to.
        planning: seconds that planning took.
    """

    mesh: tuple[int, ...]
    blocks: list[int]
    seconds: list[float]
    state_bytes: list[int]
    gathered: list[int]
    gathered_across: list[int]
    scattered: list[int]
    scattered_across: list[int]
    peers: list[int]
    planning: float

    @property
    def balance(self) -> float:
        """Largest over mean modelled seconds of a rank; 1 is perfect."""
        return max(self.seconds) * len(self.seconds) / (sum(self.seconds) or 1.0)

    def __str__(self) -> str:
        return "\n".join(_table(self))


def plan_sharded(
    model: Any,
    sharding: Sharding,
    mesh: Sequence[int],
    *,
    transformation: GradientTransformation | None = None,
    every: int = 10,
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int = 8,
    reads_parameters: bool | None = None,
    cost: CostModel = DEFAULT_COST,
) -> ShardingPlan:
    """Plan which rank owns which block of sharded parameters, and what moves. On meta tensors only.

    Args:
        model, dtype, cost: as in `plan`.
        sharding: how the model is sharded: "fsdp", FSDP2 on a mesh of one side; "hsdp", on
            (replicas, shards); "tp", tensor parallelism on one side; "fsdp+tp", on (shards,
            tensor). FSDP cuts the first side, tensor parallelism the longer one of a matrix.
        mesh: its shape.
        transformation: by default `shampoo` with its defaults and this `every`.
        ranks_per_node: consecutive ranks that share a node.
        reads_parameters: whether parameters are sent with the gradients, as they are if a stage in
            blocks reads them; by default as declared by the transformation's `blocked`.

    Raises:
        ValueError: an unknown sharding, or a mesh that does not fit it.

    >>> found = plan_sharded({"w": (64, 64)}, "fsdp", (2,), transformation=shampoo(1, max_size=32))
    >>> found.blocks, found.gathered, found.scattered  # all is where it is needed
    ([2, 2], [0, 0], [0, 0])
    """
    since = time.perf_counter()
    check_choice("sharding", sharding, ("fsdp", "hsdp", "tp", "fsdp+tp"))
    sides, mesh = 2 if sharding in ("hsdp", "fsdp+tp") else 1, tuple(mesh)
    if len(mesh) != sides:
        raise ValueError(f"mesh is {mesh}; {sharding!r} takes a mesh of {plural(sides, 'side')}.")
    tx = as_transformation(transformation or shampoo(1e-3, every=every))
    params = meta_parameters(model, dtype)
    state = tx.init(params)
    place = _placements(sharding)
    known = dict(zip(leaf_names(params), flatten(params)[0]))
    shapes = {name: tuple(x.shape) for name, x in known.items()}
    ways = {name: tuple(place(shape)) for name, shape in shapes.items()}
    cut = find_state((state,), BlockedState)  # a `partition` around it hides the others
    inside = {name: x for name, x in known.items() if cut is not None and name in cut.layout}
    layout = layout_in(tx, inside)  # raises if there is no `blocked`, or several
    scope = next(s for s in scopes_of(tx, state, params) if s.in_blocks)
    costs = costs_of(layout.stacks, every, cost, scope.works)

    @functools.cache
    def holdings(shape: Shape, way: Any, merged: Shape) -> list[Holding]:
        """What every rank of the mesh holds of a parameter; one list for all that are alike."""
        each = itertools.product(*map(range, mesh))
        return [holding_at(shape, way, mesh, at, merged) for at in each]

    where = zip(inside, layout.parameters)
    of_blocks = [holdings(shapes[name], ways[name], at.merged) for name, at in where]
    nodes = [rank // ranks_per_node for rank in range(math.prod(mesh))]
    held = Held(list(zip(*of_blocks)), nodes)
    shares = {
        name: [math.prod(h.shape) for h in holdings(shape, ways[name], shape)]
        for name, shape in shapes.items()
        if name not in inside
    }
    state_bytes = _of_others(state, shapes, shares, len(nodes))
    blocks, seconds = [0] * len(nodes), [0.0] * len(nodes)
    shards = near_shards(layout, costs, held)
    for piece in shards.pieces:
        blocks[piece.owner] += piece.rows
        seconds[piece.owner] += piece.rows * costs[piece.stack]
        state_bytes[piece.owner] += piece.rows * scope.state_bytes[piece.stack]
    reads = shows_parameters(tx) if reads_parameters is None else reads_parameters
    moved = _moved(layout, held, shards, columns=2 if reads else 1)
    return ShardingPlan(mesh, blocks, seconds, state_bytes, *moved, time.perf_counter() - since)


def _of_others(
    state: Any, shapes: Mapping[str, Shape], shares: Mapping[str, Sequence[int]], ranks: int
) -> list[int]:
    """Bytes of state outside blocks on every rank: placed like its parameter, or unassigned."""
    found = [0] * ranks

    def add(place: StatePlace, x: Tensor) -> None:
        name = ".".join(place.leaf)
        if place.stack is not None and x.ndim:
            return  # belongs to a block
        sharded = name in shares and tuple(x.shape) == shapes[name]
        for rank in range(ranks):
            found[rank] += shares[name][rank] * x.itemsize if sharded else x.nbytes

    map_tensors(add, state)
    return found


def _placements(sharding: Sharding) -> Callable[[Shape], Sequence[Any]]:
    """Placements by the shape of a parameter, one per mesh dimension."""
    # Imported here, since it imports sympy, which adds to the process's warning filters.
    from torch.distributed.tensor import Replicate, Shard

    def tensor(shape: Shape) -> Any:
        return Replicate() if len(shape) != 2 else Shard(0 if shape[0] >= shape[1] else 1)

    def place(shape: Shape) -> Sequence[Any]:
        first = Shard(0) if shape else Replicate()
        return {
            "fsdp": [first],
            "hsdp": [Replicate(), first],
            "tp": [tensor(shape)],
            "fsdp+tp": [first, tensor(shape)],
        }[sharding]

    return place


def _moved(
    layout: Layout, held: Held, shards: Shards, columns: int
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Fields of `ShardingPlan`: gathered and scattered bytes, each also across nodes, and peers.

    Args:
        columns: how many numbers are sent per gradient entry: 2 if the parameter's is sent too.
    """
    size, node = held.size, held.nodes
    gathered, across, scattered, back_across = ([0] * size for _ in range(4))
    peers: list[set[int]] = [set() for _ in range(size)]
    of_rows = held.of_blocks(layout)
    alike: dict[tuple[str, int, int], int] = {}  # blocks of one owner that are held alike
    known: dict[int, Shares] = {}
    for piece in shards.pieces:
        for row in piece.all_rows:
            shares = of_rows[piece.stack][row]
            known[id(shares)] = shares
            key = piece.stack, piece.owner, id(shares)
            alike[key] = alike.get(key, 0) + 1
    for (stack, owner, share), rows in alike.items():
        itemsize = layout.stacks[stack].dtype.itemsize
        for ranks, common in known[share].boxes:
            size_of = rows * common * itemsize
            source = source_of(ranks, owner, node)
            if source != owner:
                gathered[owner] += size_of * columns
                across[owner] += size_of * columns * (node[source] != node[owner])
                peers[source].add(owner)
            for rank in ranks:
                if rank != owner:
                    scattered[rank] += size_of
                    back_across[rank] += size_of * (node[rank] != node[owner])
            peers[owner].update(ranks)
    count = [len(found - {rank}) for rank, found in enumerate(peers)]
    return gathered, across, scattered, back_across, count


def _table(found: ShardingPlan) -> list[str]:
    size = math.prod(found.mesh)
    shape = " x ".join(map(str, found.mesh))
    rows: list[Row] = [
        ("blocks", found.blocks, counted),
        ("state", found.state_bytes, readable),
        ("gathered", found.gathered, readable),
        ("  across nodes", found.gathered_across, readable),
        ("scattered", found.scattered, readable),
        ("  across nodes", found.scattered_across, readable),
        ("peers", found.peers, counted),
        ("time per step", found.seconds, duration),
    ]
    return [
        f"{plural(sum(found.blocks), 'block')} over {plural(size, 'rank')}, a mesh of {shape}.",
        f"Balance (largest / mean modelled time): {found.balance:.3f}. "
        f"Planned in {found.planning:.1f} s.",
        "",
        *spread_table(rows),
    ]
