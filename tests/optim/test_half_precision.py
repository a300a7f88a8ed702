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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)).bfloat16()
    before = copy.deepcopy(model)
    optimizer = fs.for_model(model, "soap", lr=RATE, other_lr=RATE, stochastic_rounding=True)
    stepped(optimizer, list(model.parameters()))
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        assert not torch.equal(p, q), name
        assert "rounded/seen" in " ".join(optimizer.state[p])


def test_a_checkpoint_resumes_to_the_bit() -> None:
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


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "splus"])  # chains, and none
def test_it_is_switched_on_in_the_middle_of_a_run(name: str) -> None:
    """What an optimizer without it saved has the same names with it, clocks as well."""
    method, params = fs.recipes.RECIPES[name], parameters()
    plain = fs.Optimizer(params, method, lr=RATE)
    stepped(plain, params)
    saved = copy.deepcopy(plain.state_dict())
    rounding = fs.Optimizer(params, method, lr=RATE, stochastic_rounding=True)
    with pytest.raises(ValueError, match="missing from the checkpoint: param_0/rounded/seen"):
        rounding.load_state_dict(saved)
    rounding.load_state_dict(saved, strict=False)
    found = rounding.state_dict()["state"]
    for i, entries in saved["state"].items():
        assert found[i].keys() - entries.keys() == {"rounded/seen"}
        assert all(torch.equal(x, found[i][entry]) for entry, x in entries.items())
    stepped(rounding, params)
    fs.state.check(rounding.chain_states()[0])


def test_without_parameters_in_half_precision_it_is_refused() -> None:
    """As under autocast, and mixed precision of FSDP; a group may have none."""
    params = [Parameter(normal(4, 4, seed=1)), Parameter(normal(3, seed=2).double())]
    before = [p.detach().clone() for p in params]
    groups = [{"params": [p]} for p in params]
    with pytest.raises(ValueError, match=r"in torch.float32, torch.float64: .* model.to\("):
        stepped(fs.Optimizer(groups, fs.sgd, lr=0.1, stochastic_rounding=True), params)
    assert all(map(torch.equal, before, params))
    params[0].data = params[0].data.half()
    stepped(fs.Optimizer(groups, fs.sgd, lr=0.1, stochastic_rounding=True), params)


def test_a_flag_that_is_no_bool() -> None:
    with pytest.raises(TypeError, match="stochastic_rounding is 1; give True or False"):
        fs.Optimizer(parameters(), fs.sgd, lr=0.1, stochastic_rounding=1)  # type: ignore[arg-type]
