"""Every recipe on several ranks: blocks or leaves have owners, and the bits of one process."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state import load_state_dict, merged, state_dict
from tests.distributed.problems import SHAPES, train, tree
from tests.distributed.ranks import Ranks
from tests.sooner import these
from tests.trees import assert_equal, tensors

DECAYS = {name: len(shape) > 1 for name, shape in SHAPES.items()}
RECIPES: dict[str, Any] = {
    "muon": fs.muon,
    "muon_bf16": functools.partial(fs.muon, dtype=torch.bfloat16),
    "muon_lion": functools.partial(
        fs.muon, others=fs.sharded(fs.guarded(fs.lion(0.01), by_leaf=True))
    ),
    "normuon": functools.partial(fs.normuon, cautious_decay=True),
    "spectral_descent": fs.spectral_descent,
    "soap_muon": functools.partial(fs.soap_muon, every=3, gate=fs.AgreementGate(0.1)),
    "splus": functools.partial(fs.splus, every=3),
    "adamw": functools.partial(fs.adamw, mask=DECAYS),
    "sgd": functools.partial(fs.sgd, momentum=0.9, weight_decay=0.1, mask=DECAYS),
    "lion": functools.partial(fs.lion, weight_decay=0.1),
    "sign_descent": functools.partial(fs.sign_descent, scale="mean"),
    "soap": functools.partial(fs.soap, every=3, max_size=16, sides="smaller"),
}
GUARDED = ("muon", "muon_lion", "normuon", "spectral_descent", "soap")


def make(recipe: str, shares: bool) -> fs.GradientTransformation:
    tx: fs.GradientTransformation = RECIPES[recipe](0.02, distribute=fs.sharded if shares else None)
    return tx


def run(rank: int, recipe: str, shares: bool) -> Any:
    return train(make(recipe, shares), tree(0), range(1, 8), tree)[0]


@pytest.mark.parametrize(
    "recipe", these([*RECIPES], sooner=["muon_lion", "soap_muon", "adamw", "soap"])
)
def test_any_number_of_ranks_gives_the_bits_of_one_process(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, run, recipe, False)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0))))
    for size in (1, 2, 3):
        for got in ranks(size, run, recipe, True):
            assert_equal(got, expected)


def with_holes(recipe: str, t: int) -> dict[str, torch.Tensor | None]:
    """Gradients of matrices and of vectors that are missing, and that are not finite."""
    found: dict[str, Any] = dict(tree(t))
    if t in (2, 4):
        found |= {"head": None, "vector": None}
    if t in (3, 4) and recipe in GUARDED:
        for name in ("even", "scalar"):
            found[name] = torch.full(SHAPES[name], math.nan)
    return found


def run_with_holes(rank: int, recipe: str, shares: bool) -> Any:
    tx = make(recipe, shares)
    return train(tx, tree(0), range(1, 7), functools.partial(with_holes, recipe))[0]


@pytest.mark.parametrize("recipe", ["muon", "muon_lion", "adamw", "sgd", "lion", "soap"])
def test_gradients_that_are_missing_or_not_finite(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, run_with_holes, recipe, False)
    assert all(x.isfinite().all() for x in tensors(expected))
    for got in ranks(3, run_with_holes, recipe, True):
        assert_equal(got, expected)


def half(rank: int, recipe: str) -> Any:
    params, state = train(make(recipe, True), tree(0), range(1, 5), tree)
    return params, state_dict(state)


def rest(rank: int, recipe: str, params: Any, saved: Any) -> Any:
    tx = make(recipe, True)
    state = load_state_dict(tx.init(params), saved).state
    return train(tx, params, range(5, 8), tree, state)[0]


@pytest.mark.parametrize("recipe", ["normuon", "adamw"])
def test_a_checkpoint_of_three_ranks_goes_on_on_two(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, run, recipe, False)
    found = ranks(3, half, recipe)
    params, saved = found[0][0], merged(part for _, part in found)
    for got in ranks(2, rest, recipe, params, saved):
        assert_equal(got, expected)


@pytest.mark.parametrize("recipe", ["muon", "normuon", "adamw", "lion"])
def test_what_a_parameter_remembers_is_on_its_owner_alone(ranks: Ranks, recipe: str) -> None:
    """Matrices and vectors, and every rank has some of both."""
    parts = [saved for _, saved in ranks(3, half, recipe)]
    owners = [{name.split("/")[0] for name in part} & SHAPES.keys() for part in parts]
    assert sorted(name for own in owners for name in own) == sorted(SHAPES)
    for own in owners:
        assert any(len(SHAPES[name]) > 1 for name in own)


def wrapped(rank: int, recipe: str, shares: bool) -> Any:
    """By the wrapper, with a rate that changes, saved whole and resumed."""
    model = {name: torch.nn.Parameter(x) for name, x in tree(0).items()}

    def optimizer() -> fs.Optimizer:
        function = RECIPES[recipe]
        options = {"distribute": fs.sharded, "consolidate": True} if shares else {}
        return fs.Optimizer(model.items(), function, lr=0.02, **options)

    opt = optimizer()
    for t in range(1, 7):
        for name, g in tree(t).items():
            model[name].grad = g
        opt.param_groups[0]["lr"] = 0.02 / t
        if t == 4:
            saved = opt.state_dict()
            opt = optimizer()
            opt.load_state_dict(saved)
        opt.step()
    return {name: p.detach() for name, p in model.items()}


@pytest.mark.parametrize("recipe", ["muon", "adamw"])
def test_by_the_wrapper(ranks: Ranks, recipe: str) -> None:
    (expected,) = ranks(1, wrapped, recipe, False)
    for got in ranks(2, wrapped, recipe, True):
        assert_equal(got, expected)
