"""Muon and its kin on several ranks: whole matrices have owners, and the bits of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state import load_state_dict, merged, state_dict
from tests.distributed.problems import train, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal, tensors

pytestmark = pytest.mark.xdist_group("ranks")

RECIPES: dict[str, Any] = {
    "muon": fs.muon,
    "muon_bf16": functools.partial(fs.muon, dtype=torch.bfloat16),
    "normuon": functools.partial(fs.normuon, cautious_decay=True),
    "spectral_descent": fs.spectral_descent,
    "soap_muon": functools.partial(fs.soap_muon, every=3, gate=fs.AgreementGate(0.1)),
    "splus": functools.partial(fs.splus, every=3),
}


def make(recipe: str, shares: bool) -> fs.GradientTransformation:
    tx: fs.GradientTransformation = RECIPES[recipe](0.02, distribute=fs.sharded if shares else None)
    return tx


def run(rank: int, recipe: str, shares: bool) -> Any:
    return train(make(recipe, shares), tree(0), range(1, 8), tree)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_ranks_gives_the_bits_of_one_process(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, run, recipe, False)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0))))
    for size in (1, 2, 3):
        for got in ranks(size, run, recipe, True):
            assert_equal(got, expected)


def half(rank: int, recipe: str) -> Any:
    params, state = train(make(recipe, True), tree(0), range(1, 5), tree)
    return params, state_dict(state)


def rest(rank: int, recipe: str, params: Any, saved: Any) -> Any:
    tx = make(recipe, True)
    state = load_state_dict(tx.init(params), saved).state
    return train(tx, params, range(5, 8), tree, state)[0]


def test_a_checkpoint_of_three_ranks_goes_on_on_two(ranks: Ranks) -> None:
    (expected,) = ranks(1, run, "normuon", False)
    found = ranks(3, half, "normuon")
    params, saved = found[0][0], merged(part for _, part in found)
    for got in ranks(2, rest, "normuon", params, saved):
        assert_equal(got, expected)
