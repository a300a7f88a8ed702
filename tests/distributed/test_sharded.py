"""Sharded = single: any number of ranks gives the bits of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal, tensors

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 50
Shapes = dict[str, tuple[int, ...]]
# Ragged at 16, with odd sides of 9 and more, orders 0 to 4, and stacks of one block and of many.
SHAPES: Shapes = {
    "conv": (9, 5, 3, 3),
    "deep": (20, 17, 3),
    "embedding": (45, 21),
    "even": (32, 48),
    "head": (11, 13),
    "narrow": (27, 1),
    "scalar": (),
    "vector": (37,),
}


def tree(seed: int, shapes: Shapes = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def optimizer(distribute: Any = None, **options: Any) -> fs.GradientTransformation:
    defaults = {"every": 4, "max_size": 16, "momentum": 0.9, "weight_decay": 0.01}
    return fs.shampoo(0.01, distribute=distribute, **(defaults | options))


def train(tx: fs.GradientTransformation, steps: int = STEPS, donate: bool = True) -> Any:
    params = tree(0)
    state = tx.init(params)
    for t in range(1, steps + 1):
        updates, state = tx.update(tree(t), state, params, donate=donate)
        params = fs.apply_updates(params, updates)
    return params


def on_a_rank(rank: int, options: dict[str, Any], sharding: dict[str, Any]) -> Any:
    return train(optimizer(functools.partial(fs.sharded, **sharding), **options))


CHAINS = [
    {"grafting": "adam"},
    {"grafting": "adam", "stagger": True},
    {"grafting": "rms", "nesterov": True},
    {"grafting": "adagrad", "beta2": 1.0},
    {"grafting": "sgd", "start": 3},
    {"grafting": None, "stagger": True},
]


@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    ranks: Ranks, options: dict[str, Any]
) -> None:
    expected = train(optimizer(**options))
    assert any(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0))))
    for size in (1, 2, 3, 4):
        for got in ranks(size, on_a_rank, options, {}):
            assert_equal(got, expected)
