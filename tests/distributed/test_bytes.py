"""Messages hold what has to move and little else, by simulation, without processes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Shard

import funshampoo as fs
from funshampoo.blocks.blocking import layout_in
from funshampoo.core.boxes import holding_at
from funshampoo.distributed.cost import DEFAULT_COST
from funshampoo.distributed.ownership import works_of
from funshampoo.distributed.parts import near_shards
from funshampoo.distributed.routes import HEAD, Held, Messages, find_routes
from funshampoo.plan.planner import meta_parameters
from funshampoo.plan.shapes import model_shapes


@pytest.mark.parametrize(
    ("ranks", "sample"),
    [
        (4, range(4)),
        pytest.param(64, range(64), marks=pytest.mark.slow),
        pytest.param(1024, range(0, 1024, 100), marks=pytest.mark.slow),
    ],
)
def test_a_step_moves_at_most_a_twentieth_more_than_its_pieces(ranks: int, sample: range) -> None:
    """GPT-2 by rows, blocks of 1,024: heads and alignment beside the pieces, both ways together."""
    shapes = dict(sorted(model_shapes("gpt2").items()))
    tx, params = fs.shampoo(0.1, max_size=1024), meta_parameters(shapes, torch.float32)
    layout = layout_in(tx, params)
    everyone = [
        [
            holding_at(shape, [Shard(0)], (ranks,), (rank,), where.merged)
            for shape, where in zip(shapes.values(), layout.parameters)
        ]
        for rank in range(ranks)
    ]
    held = Held(everyone)
    blocks = {name: stack.block for name, stack in layout.stacks.items()}
    works = works_of(tx, blocks, tx.init(params))
    costs = {name: DEFAULT_COST.block(b, 10, *works[name]) for name, b in blocks.items()}
    shards = near_shards(layout, costs, held)
    dtypes = {(0, i): torch.float32 for i in range(len(shapes))}
    moved = pieces = 0
    for rank in sample:
        routes = find_routes(layout, shards.pieces, held, [False] * len(shapes), rank)
        for into, head in ((routes.gather.into, 0), (routes.scatter.into, HEAD)):
            moved += Messages(into, dtypes, head).bytes
            pieces += sum(4 * slot.piece.numel for peer in into for slot in peer)
    assert pieces < moved <= 1.05 * pieces
    assert pieces > 2**20  # a good deal
