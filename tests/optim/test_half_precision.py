"""Parameters in bfloat16, whose small steps the wrapper rounds at random if it is told to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import funshampoo as fs

STEPS, RATE = 5, 1e-4
DECIDED: dict[str, dict[str, Any]] = {
    "shampoo": {"max_size": 8, "every": 2},
    "soap": {"max_size": 8, "every": 2},
    "muon": {},
    "adamw": {},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[Parameter]:
    return [Parameter(normal(12, 10, seed=1).bfloat16()), Parameter(normal(8, 6, seed=2))]


def stepped(optimizer: torch.optim.Optimizer, params: list[Parameter], first: int = 0) -> None:
    for t in range(first, first + STEPS):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=10 * t + i).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", DECIDED)
def test_it_is_the_stage_behind_the_chain(name: str) -> None:
    method, options = fs.recipes.RECIPES[name], DECIDED[name]

    def rounding(learning_rate: float) -> fs.GradientTransformation:
        return fs.chain(method(learning_rate, **options), fs.stochastic_rounding())

    own, option, nearest = parameters(), parameters(), parameters()
    stepped(fs.Optimizer(own, rounding, lr=RATE), own)
    stepped(fs.Optimizer(option, method, lr=RATE, stochastic_rounding=True, **options), option)
    stepped(fs.Optimizer(nearest, method, lr=RATE, **options), nearest)
    assert all(map(torch.equal, own, option))
    assert not torch.equal(nearest[0], own[0])
    assert torch.equal(nearest[1], own[1])  # float32


def test_where_the_optimizer_scales_and_for_whole_models() -> None:
    params = parameters()
    stepped(fs.Optimizer(params, fs.trace(0.9), lr=1e-2, stochastic_rounding=True), params)
    assert not torch.equal(params[0], parameters()[0])
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)).bfloat16()
    before = copy.deepcopy(model)
    optimizer = fs.for_model(model, "soap", lr=RATE, other_lr=RATE, stochastic_rounding=True)
    stepped(optimizer, list(model.parameters()))
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        assert not torch.equal(p, q), name
        assert "stochastic_rounding/seen" in " ".join(optimizer.state[p])


def test_a_checkpoint_resumes_to_the_bit_and_names_stay() -> None:
    params = parameters()
    options: dict[str, Any] = {"lr": RATE, "stochastic_rounding": True, "max_size": 8}
    optimizer = fs.Optimizer(params, fs.shampoo, **options)
    stepped(optimizer, params)
    saved, others = copy.deepcopy(optimizer.state_dict()), [copy.deepcopy(p) for p in params]
    stepped(optimizer, params, first=STEPS)
    again = fs.Optimizer(others, fs.shampoo, **options)
    again.load_state_dict(saved)
    stepped(again, others, first=STEPS)
    assert all(map(torch.equal, params, others))
    plain = fs.Optimizer(parameters(), fs.shampoo, lr=RATE, max_size=8)
    stepped(plain, plain.param_groups[0]["params"])
    new = set(saved["state"][0]) - set(plain.state_dict()["state"][0])
    assert new == {"stochastic_rounding/seen"}


def test_a_flag_that_is_no_bool() -> None:
    with pytest.raises(TypeError, match="stochastic_rounding is 1; give True or False"):
        fs.Optimizer(parameters(), fs.sgd, lr=0.1, stochastic_rounding=1)  # type: ignore[arg-type]
