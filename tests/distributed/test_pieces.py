"""Boxes, owners and routes without processes: every number arrives where it belongs, once."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from funshampoo.blocks.layout import Layout, layout_of
from funshampoo.blocks.regions import grids
from funshampoo.blocks.stacks import stack_blocks
from funshampoo.core.boxes import Holding, holding_at
from funshampoo.distributed.parts import near_shards
from funshampoo.distributed.pieces import Cuts, View, as_view, coalesced, strides
from funshampoo.distributed.routes import Held, Messages, Routes, Slot, find_routes

SHAPES = st.lists(
    st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple), min_size=1, max_size=4
)
MESHES = st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3)])


@st.composite
def placed(draw: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[list[Any]]]:
    """Shapes, a mesh, and placements for every shape."""
    shapes, mesh = draw(SHAPES), draw(MESHES)
    ways = [
        [draw(st.sampled_from([Replicate(), *[Shard(d) for d in range(len(shape))]])) for _ in mesh]
        for shape in shapes
    ]
    return shapes, mesh, ways


def coordinates(mesh: tuple[int, ...]) -> list[list[int]]:
    return torch.cartesian_prod(*[torch.arange(n) for n in mesh]).view(-1, len(mesh)).tolist()


def local(x: Tensor, placements: list[Any], mesh: tuple[int, ...], at: list[int]) -> Tensor:
    """What torch.chunk gives to a rank, one side of the mesh after another."""
    for placement, parts, k in zip(placements, mesh, at):
        if placement.is_shard():
            chunks = list(torch.chunk(x, parts, placement.dim))
            empty = x.narrow(placement.dim, 0, 0)
            x = (chunks + [empty] * parts)[k]
    return x


def moved(routes: list[Routes], direction: str, read: Any, write: Any) -> None:
    """Deliver all messages of one direction by way of their bytes."""
    size = len(routes)
    dtypes = {(column, i): torch.float32 for column in (0, 1) for i in range(9)}
    sent: list[list[list[Tensor]]] = []
    for rank, both in enumerate(routes):
        route = getattr(both, direction)
        for slot in route.stay:
            write(rank, slot, read(rank, slot))
        out = Messages(route.out, dtypes, 0)
        buffer = out.buffer(torch.device("cpu"))
        views = iter(out.views(buffer))
        for slot, view in zip(out.slots, out.views(buffer)):
            view.copy_(read(rank, slot))
        sent.append([[next(views) for _ in slots] for slots in route.out])
        assert sum(out.splits) == out.bytes
    for rank, both in enumerate(routes):
        into = getattr(both, direction).into
        lengths = Messages(into, dtypes, 0).splits
        for source in range(size):
            out = Messages(getattr(routes[source], direction).out, dtypes, 0)
            assert out.splits[rank] == lengths[source]
            for slot, values in zip(into[source], sent[source][rank], strict=True):
                # The same numbers in the same order, whose sides are one on one end perhaps.
                assert values.numel() == slot.piece.numel
                write(rank, slot, values.reshape(slot.piece.shape))


@settings(deadline=None, max_examples=60)
@given(placed(), st.sampled_from([2, 4, 16]), st.sampled_from(["none", "small", "matrix"]))
def test_gradients_reach_their_owners_and_updates_their_holders(
    problem: Any, max_size: int, merge: Any
) -> None:
    shapes, mesh, ways = problem
    leaves = [torch.randn(shape) for shape in shapes]
    keys = tuple((shape, torch.float32, torch.device("cpu")) for shape in shapes)
    layout: Layout = layout_of(keys, max_size, merge, 2)
    ranks = coordinates(mesh)
    parts = [[local(x, way, mesh, at) for x, way in zip(leaves, ways)] for at in ranks]
    everyone: list[list[Holding]] = [
        [
            holding_at(shape, way, mesh, at, where.merged)
            for shape, way, where in zip(shapes, ways, layout.parameters)
        ]
        for at in ranks
    ]
    for own, of_rank in zip(parts, everyone):
        assert [x.numel() for x in own] == [math.prod(held.shape) for held in of_rank]
    held = Held(everyone)
    costs = {name: float(math.prod(s.block)) + 1 for name, s in layout.stacks.items()}
    shards = near_shards(layout, costs, held)
    routes = [
        find_routes(layout, shards.pieces, held, [True] * len(shapes), rank)
        for rank in range(len(ranks))
    ]
    expected = stack_blocks(leaves, layout)
    rows: list[dict[str, list[int]]] = [{} for _ in ranks]
    for piece in shards.pieces:
        rows[piece.owner].setdefault(piece.stack, []).extend(piece.all_rows)
    taken = sorted(r for own in rows for s, rs in own.items() for r in [(s, k) for k in rs])
    assert taken == sorted((s, k) for s, stack in layout.stacks.items() for k in range(stack.rows))

    stacks = [
        {s: torch.full((len(rs), *layout.stacks[s].block), math.nan) for s, rs in own.items()}
        for own in rows
    ]

    def from_leaf(rank: int, slot: Slot) -> Tensor:
        return as_view(parts[rank][slot.parameter].contiguous(), slot.piece.shape, slot.piece.local)

    def of_rows(rank: int, slot: Slot) -> Tensor:
        return as_view(stacks[rank][slot.stack], slot.piece.shape, slot.piece.rows)

    moved(routes, "gather", from_leaf, lambda rank, slot, x: of_rows(rank, slot).copy_(x))
    for own, found in zip(rows, stacks):
        for stack, mine in own.items():
            assert torch.equal(found[stack], expected[stack][mine])

    updates = [[torch.full(x.shape, math.nan) for x in own] for own in parts]

    def into_leaf(rank: int, slot: Slot, x: Tensor) -> None:
        target = updates[rank][slot.parameter]
        as_view(target, slot.piece.shape, slot.piece.local).copy_(x)

    moved(routes, "scatter", of_rows, into_leaf)
    for own, found in zip(parts, updates):
        assert all(torch.equal(a, b) for a, b in zip(own, found))


@given(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.data())
def test_rows_of_a_grid_are_smaller_grids_in_order(grid: tuple[int, ...], data: Any) -> None:
    total = math.prod(grid)
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    numbers = torch.arange(total).view(grid)
    found = [
        n
        for part in grids(first, last, grid)
        for n in numbers[tuple(slice(r.start, r.stop) for r in part)].reshape(-1).tolist()
    ]
    assert found == list(range(first, last))


SIDES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@given(SIDES, st.data())
def test_views_of_a_flat_tensor(sides: list[tuple[int, bool]], data: Any) -> None:
    """Coalesced, and found by `Cuts`: runs, strided ones, the same twice, and ones that overlap."""
    shape = tuple(n for n, _ in sides)
    wider = tuple(n + gap for n, gap in sides)  # what it is a part of
    found, (steps,) = coalesced(shape, strides(wider))
    numel = math.prod(wider)
    flat = torch.arange(2.0 * numel)
    last = 2 * numel - 1 - sum((n - 1) * s for n, s in zip(shape, strides(wider)))
    places = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=4))
    cuts = Cuts([(found, View(steps, at)) for at in [*places, places[0]]], len(flat))
    for at, x in zip([*places, places[0]], cuts.of(flat), strict=True):
        expected = flat.as_strided(shape, strides(wider), at)
        assert torch.equal(x, expected.reshape(found))
        assert x.data_ptr() == expected.data_ptr()
