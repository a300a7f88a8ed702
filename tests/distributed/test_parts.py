"""Sharded parameters: whatever a rank holds of them, the numbers are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.problems import optimizer, train, tree
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = range(1, 10)


def placements_of(sharding: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[Any]]:
    """(shape of the mesh, placements) of one parameter, on 2 or 4 ranks."""
    last = Shard(len(shape) - 1) if shape else Replicate()
    first = Shard(0) if shape else Replicate()
    return {
        "rows of 2": ((2,), [first]),
        "rows of 4": ((4,), [first]),
        "columns of 2": ((2,), [last]),
        "replicated": ((2,), [Replicate()]),
        "hybrid": ((2, 2), [Replicate(), first]),
        "both": ((2, 2), [first, last]),
    }[sharding]


def placed(values: dict[str, Tensor], sharding: str) -> dict[str, DTensor]:
    found = {}
    for name, x in values.items():
        mesh, placements = placements_of(sharding, tuple(x.shape))
        found[name] = distribute_tensor(x, init_device_mesh("cpu", mesh), placements)
    return found


def whole(tree: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x.full_tensor() for name, x in tree.items()}


def train_placed(rank: int, sharding: str, options: dict[str, Any]) -> dict[str, Tensor]:
    tx = optimizer({}, **options)
    params = placed(tree(0), sharding)
    params, _ = train(tx, params, STEPS, lambda t: placed(tree(t), sharding))
    return whole(params)


@pytest.mark.parametrize(
    ("size", "sharding"),
    [
        (2, "rows of 2"),
        (2, "columns of 2"),
        (2, "replicated"),
        (4, "rows of 4"),
        (4, "hybrid"),
        (4, "both"),
    ],
)
def test_the_numbers_are_those_of_one_process(ranks: Ranks, size: int, sharding: str) -> None:
    expected, _ = train(optimizer(), tree(0), STEPS, tree)
    for found in ranks(size, train_placed, sharding, {}):
        for name, x in expected.items():
            assert torch.equal(found[name], x), name
