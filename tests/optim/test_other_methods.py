"""A checkpoint that another method wrote: the error begins with that, whatever it trips over."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import funshampoo as fs
from funshampoo.recipes import RECIPES

# The same entries under the same names: these load.
TWINS = [{"lion", "sign_descent"}, {"muon", "spectral_descent"}]
FOREIGN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}


def stepped(make: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = make(layer.parameters(), lr=0.01)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer


def of_recipe(name: str) -> fs.Optimizer:
    found: fs.Optimizer = stepped(functools.partial(fs.Optimizer, method=RECIPES[name]))
    return found


@functools.cache
def saved_by(name: str) -> dict[str, Any]:
    found = of_recipe(name) if name in RECIPES else stepped(FOREIGN[name])
    return copy.deepcopy(found.state_dict())


@pytest.mark.parametrize("here", RECIPES)
def test_another_recipes_checkpoint(here: str) -> None:
    optimizer = of_recipe(here)
    for there in RECIPES.keys() - {here}:
        if {here, there} in TWINS:
            continue
        with pytest.raises(ValueError, match=f"^the checkpoint is of .* than {here}: ") as refusal:
            optimizer.load_state_dict(saved_by(there))
        first = str(refusal.value).split("\n")[0]
        assert "Construct the optimizer that wrote it, or load only the parameters" in first
        own, others = (set(saved_by(name)["param_groups"][0]) for name in (here, there))
        differ = first.split("its groups ")[1].split(". Nothing")[0]
        told = set(re.findall(r"\w+", differ)) & (own | others)
        assert told
        assert told <= own ^ others


@pytest.mark.parametrize("here", ["shampoo", "adamw", "sgd"])
@pytest.mark.parametrize("there", FOREIGN)
def test_another_optimizers_checkpoint(here: str, there: str) -> None:
    """It fitted the state of sgd, which is empty, and was adopted as notes of the user's."""
    optimizer = of_recipe(here)
    before = copy.deepcopy(optimizer.param_groups[0]["lr"])
    entries = sorted(saved_by(there)["state"][0])
    saved = saved_by(there)
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=f"is of another optimizer, which keeps {entries[0]}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == before


def test_the_cause_is_told_too() -> None:
    """An option of one method is out of range for another; a state has other entries."""
    with pytest.raises(ValueError, match=r"another method(.|\n)*scale is 'muon'; choose one of"):
        of_recipe("sign_descent").load_state_dict(saved_by("muon"))
    with pytest.raises(ValueError, match=r"another method(.|\n)*unknown to the state: param_0/"):
        of_recipe("kl_shampoo").load_state_dict(saved_by("kl_soap"))


@pytest.mark.parametrize("here", ["shampoo", "sgd"])
def test_a_checkpoint_of_its_own_is_not_another_methods(here: str) -> None:
    """Neither for what clients keep in groups and under parameters, nor if it is damaged."""
    optimizer = of_recipe(here)
    optimizer.param_groups[0] |= {"rho": 0.1, "initial_lr": 0.2}
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["a note"] = 1.0
    saved = copy.deepcopy(optimizer.state_dict())
    of_recipe(here).load_state_dict(saved)
    saved["state"][0]["w/x"] = torch.ones(1)
    saved["param_groups"][0].pop("nesterov")  # as one from before it had that
    with pytest.raises(ValueError, match=r"^the checkpoint does not fit the state"):
        of_recipe(here).load_state_dict(saved)


def test_an_option_of_any_keywords_is_no_sign_of_another_method() -> None:
    def mine(learning_rate: float, **options: Any) -> fs.GradientTransformation:
        return fs.shampoo(learning_rate, **options)

    saved = copy.deepcopy(stepped(functools.partial(fs.Optimizer, method=mine, momentum=0.9)))
    with pytest.raises(ValueError, match=r"^the checkpoint does not fit the state"):
        stepped(functools.partial(fs.Optimizer, method=mine)).load_state_dict(saved.state_dict())


def test_a_group_with_a_method_of_its_own_has_the_defaults_of_all() -> None:
    """These are no sign of another method; what the group's own would not have is one."""

    def two(first: Any, second: Any) -> fs.Optimizer:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        methods = zip(net, (first, second))
        groups = [{"params": list(layer.parameters()), "method": m} for layer, m in methods]
        net(torch.ones(3)).sum().backward()
        optimizer = fs.Optimizer(groups, fs.shampoo, lr=0.01)
        optimizer.step()
        return optimizer

    optimizer = two(fs.soap, fs.adamw)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="another method than adamw: its groups have basis"):
        two(fs.adamw, fs.soap).load_state_dict(saved)
    saved["state"][2].pop("scale_by_adam/first")
    with pytest.raises(ValueError, match="^the checkpoint does not fit the state"):
        optimizer.load_state_dict(saved)
