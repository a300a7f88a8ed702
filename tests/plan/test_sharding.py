"""Plans of sharded parameters count what a job would send."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.blocks.blocking import layout_in
from funshampoo.core.boxes import holding_at
from funshampoo.distributed.cost import DEFAULT_COST
from funshampoo.distributed.ownership import works_of
from funshampoo.distributed.parts import near_shards
from funshampoo.distributed.routes import Held, find_routes
from funshampoo.plan.__main__ import main
from funshampoo.plan.planner import meta_parameters
from funshampoo.plan.sharding import plan_sharded

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
    held, blocks = Held(everyone), {n: s.block for n, s in layout.stacks.items()}
    works = works_of(tx, blocks, tx.init(params))
    costs = {n: DEFAULT_COST.block(block, 10, *works[n]) for n, block in blocks.items()}
    shards = near_shards(layout, costs, held)
    for rank in range(held.size):
        routes = find_routes(layout, shards, held, [False] * len(SHAPES), rank)
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
