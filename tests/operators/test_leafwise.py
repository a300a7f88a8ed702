"""Stages of one formula, as a user writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.authoring import leafwise
from funshampoo.testing import check_stage

PARAMS = {"w": torch.arange(6.0).view(3, 2), "b": torch.ones(2)}


def soft_threshold(least: Any) -> fs.GradientTransformation:
    def shrunk(u: Tensor, least: Any, block_ndim: int) -> Tensor:
        return u.sign() * (u.abs() - least).clamp(min=0)

    return leafwise(shrunk, [least], elementwise=True)


def add_decay(share: Any) -> fs.GradientTransformation:
    def decayed(u: Tensor, w: Tensor, share: Any, block_ndim: int) -> Tensor:
        return u + share * w

    return leafwise(decayed, [share], needs_params=True)


@pytest.mark.parametrize("stage", [lambda: soft_threshold(0.1), lambda: add_decay(0.1)])
def test_it_meets_the_contract(stage: Any) -> None:
    check_stage(stage)


def test_a_number_is_live_and_the_parameter_has_the_updates_dtype() -> None:
    params = {name: x.bfloat16() for name, x in PARAMS.items()}
    tx = fs.inject_hyperparams(add_decay)(share=0.5)
    state = tx.init(params)
    assert repr(tx.update(params, state, params)[0]["b"]) == "tensor([1.5000, 1.5000])"
    edited = state._replace(hyperparams={"share": torch.tensor(0.25)})
    assert tx.update(params, edited, params)[0]["b"].tolist() == [1.25, 1.25]
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)


def test_it_may_flip_the_sign_as_any_stage_of_a_users() -> None:
    """So decay behind it is not refused, as it is directly behind the learning rate."""
    late = fs.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="add_decayed_weights stands behind"):
        fs.chain(fs.scale_by_learning_rate(0.1), late)
    fs.chain(fs.scale_by_learning_rate(0.1), leafwise(lambda u, block_ndim: -u), late)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned None"),
        (torch.ones(()), r"returned a tensor \(\)"),
        (torch.ones(3, 2) > 0, "of torch.bool; return the new update, a floating-point"),
        ((1,), "returned"),
    ],
)
def test_what_is_no_update_is_an_error(returned: Any, words: str) -> None:
    tx = leafwise(lambda u, block_ndim: returned, name="wrong")
    assert tx.name == "wrong"
    params = {"w": PARAMS["w"]}
    with pytest.raises(TypeError, match=words):
        tx.update(params, tx.init(params), params)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="leaf is 3; give a function"):
        leafwise(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"numbers is 0.5; give a list"):
        leafwise(lambda u, x, block_ndim: u, 0.5)  # type: ignore[arg-type]
