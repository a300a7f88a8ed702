"""Plans of sharded parameters count what a job would send."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.blocks.blocking import layout_in
from funshampoo.core.boxes import holding_at
from funshampoo.core.tree import flatten
from funshampoo.distributed.cost import DEFAULT_COST
from funshampoo.distributed.ownership import works_of
from funshampoo.distributed.parts import near_shards
from funshampoo.distributed.routes import Held, find_routes
from funshampoo.plan.__main__ import main
from funshampoo.plan.planner import meta_parameters
from funshampoo.plan.sharding import plan_sharded

F32 = torch.float32
SHAPES = {"bias": (200,), "down": (200, 64), "embedding": (300, 64), "n": (64,), "up": (64, 200)}


@pytest.mark.parametrize(
    ("sharding", "mesh"), [("fsdp", (3,)), ("hsdp", (2, 2)), ("tp", (4,)), ("fsdp+tp", (2, 2))]
)
def test_the_plan_counts_the_bytes_of_all_messages(sharding: Any, mesh: tuple[int, ...]) -> None:
    tx = fs.shampoo(0.1, max_size=64)
    found = plan_sharded(SHAPES, sharding, mesh, transformation=tx, ranks_per_node=2)
    params = meta_parameters(SHAPES, torch.float32)
    layout = layout_in(tx, params)
    ways = [placed(sharding, shape) for shape in SHAPES.values()]
    everyone = [
        [
            holding_at(shape, way, mesh, at, where.merged)
            for shape, way, where in zip(SHAPES.values(), ways, layout.parameters)
        ]
        for at in itertools.product(*map(range, mesh))
    ]
    nodes = [rank // 2 for rank in range(len(everyone))]
    held, blocks = Held(everyone, nodes), {n: s.block for n, s in layout.stacks.items()}
    works = works_of(tx, blocks, tx.init(params))
    costs = {n: DEFAULT_COST.block(block, 10, *works[n]) for n, block in blocks.items()}
    shards = near_shards(layout, costs, held)
    for rank in range(held.size):
        routes = find_routes(layout, shards.pieces, held, [False] * len(SHAPES), rank)
        for moved, across, route in (
            (found.gathered, found.gathered_across, routes.gather),
            (found.scattered, found.scattered_across, routes.scatter),
        ):
            came = [4 * sum(slot.piece.numel for slot in slots) for slots in route.into]
            assert moved[rank] == sum(came)
            elsewhere = [n for source, n in enumerate(came) if source // 2 != rank // 2]
            assert across[rank] == sum(elsewhere)
    (whole,) = plan_sharded(SHAPES, "fsdp", (1,), transformation=tx).state_bytes
    assert sum(found.state_bytes) == whole + 8 * (held.size - 1)  # all have the counter
    assert 1.0 <= found.balance < 1.5


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_outside_blocks_is_counted_where_its_parameters_are(nested: bool) -> None:
    """Muon's matrices are blocks, and its AdamW has moments of every rank's part of the rest."""
    shapes: Any = {"a": (12, 8), "b": (10,), "c": (8, 6)}
    tx = fs.muon(0.1)
    tree = {"m": shapes} if nested else shapes
    (alone,) = plan_sharded(tree, "fsdp", (1,), transformation=tx).state_bytes
    assert alone == sum(x.nbytes for x in flatten(tx.init(meta_parameters(tree, F32)))[0])
    found = plan_sharded(tree, "fsdp", (4,), transformation=tx)
    assert found.blocks == [1, 1, 0, 0]
    of_all = 8 + 2 * 8 + 2 * 4  # the clock; of b, the guard's counters and the moments' weights
    moments = [2 * 4 * n for n in (3, 3, 3, 1)]  # of b
    of_blocks = [4 * 12 * 8 + 20, 4 * 8 * 6 + 20, 0, 0]  # averages, weights, counters
    assert found.state_bytes == [of_all + m + b for m, b in zip(moments, of_blocks)]
    # Three quarters of a gradient come from others, and of the parameter, which decay reads.
    assert found.gathered == [2 * 4 * 72, 2 * 4 * 36, 0, 0]
    alike = plan_sharded(tree, "fsdp", (4,), transformation=tx, reads_parameters=False)
    assert [2 * n for n in alike.gathered] == found.gathered


def placed(sharding: str, shape: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    tensor = Replicate() if len(shape) == 1 else Shard(0 if shape[0] >= shape[1] else 1)
    return {
        "fsdp": [Shard(0)],
        "hsdp": [Replicate(), Shard(0)],
        "tp": [tensor],
        "fsdp+tp": [Shard(0), tensor],
    }[sharding]


def test_a_mesh_has_the_sides_of_its_sharding() -> None:
    with pytest.raises(ValueError, match="takes a mesh of 2 sides"):
        plan_sharded(SHAPES, "hsdp", (8,))


def test_the_program_plans_a_large_model_without_processes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--model", "gpt2", "--sharding", "hsdp", "--mesh", "4x8"])
    said = capsys.readouterr().out
    assert "over 32 ranks, a mesh of 4 x 8" in said
    assert "across nodes" in said
    for wrong in (
        ["--sharding", "fsdp"],
        [],
        ["--ranks", "2", "--sharding", "fsdp", "--mesh", "2"],
    ):
        with pytest.raises(SystemExit):
            main(["--model", "gpt2", *wrong])
