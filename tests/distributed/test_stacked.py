"""Stacked experts and fused projections on several ranks: matrices have owners of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.blocks import Stacked
from funshampoo.recipes import RECIPES
from funshampoo.state import load_state_dict, merged, state_dict
from tests.distributed.problems import train, tree
from tests.distributed.ranks import Ranks
from tests.models.zoo import Experts
from tests.sooner import these
from tests.trees import assert_equal, tensors

SHAPES = {"down": (5, 9, 13), "up": (5, 21, 9)}
FUSED = {"attention": (11, 27), "other": (9, 27)}


def gradient(t: int) -> Any:
    return tree(t, SHAPES)


def fused(t: int) -> Any:
    return tree(t, FUSED)


def make(recipe: str, shares: bool, merge: Stacked) -> fs.GradientTransformation:
    options = {"every": 3, "max_size": 8} if recipe in ("shampoo", "soap") else {}
    distribute = fs.sharded if shares else None
    return RECIPES[recipe](0.02, merge=merge, distribute=distribute, **options)


def run(rank: int, recipe: str, shares: bool) -> Any:
    experts = train(make(recipe, shares, Stacked()), gradient(0), range(1, 8), gradient)[0]
    parts = make(recipe, shares, Stacked(axis=1, parts=3))
    return experts, train(parts, fused(0), range(1, 8), fused)[0]


@pytest.mark.parametrize("recipe", these(["shampoo", "soap", "muon"], sooner=["soap", "muon"]))
def test_any_number_of_ranks_gives_the_bits_of_one_process(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, run, recipe, False)
    for size in (2, 3):
        for got in ranks(size, run, recipe, True):
            assert_equal(got, expected)


def half(rank: int) -> Any:
    tx = make("soap", True, Stacked())
    params, state = train(tx, gradient(0), range(1, 5), gradient)
    return params, state_dict(state)


def rest(rank: int, params: Any, saved: Any) -> Any:
    tx = make("soap", True, Stacked())
    state = load_state_dict(tx.init(params), saved).state
    return train(tx, params, range(5, 8), gradient, state)[0]


def test_a_checkpoint_of_three_ranks_goes_on_on_two(ranks: Ranks) -> None:
    (expected,) = ranks(1, run, "soap", False)
    found = ranks(3, half)
    params, saved = found[0][0], merged(part for _, part in found)
    for got in ranks(2, rest, params, saved):
        assert_equal(got, expected[0])


def front_door(rank: int, shares: bool) -> Any:
    torch.manual_seed(0)
    model = Experts()
    options = {"distribute": fs.sharded} if shares else {}
    optimizer = fs.for_model(model, "shampoo", lr=0.02, every=2, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    sizes = {row.name: row.state_bytes for row in fs.routing_table(optimizer).rows}
    return [p.detach() for p in model.parameters()], sizes


def test_a_model_is_trained_on_ranks_as_by_one_process(ranks: Ranks) -> None:
    ((expected, whole),) = ranks(1, front_door, False)
    found = ranks(2, front_door, True)
    for got, _ in found:
        assert_equal(got, expected)
    assert all(len(tensors(got)) == len(expected) for got, _ in found)
    shared = [sizes["up"] for _, sizes in found]
    assert max(shared) < whole["up"]  # the table says what this rank holds
    assert sum(shared) == pytest.approx(whole["up"], rel=0.05)
