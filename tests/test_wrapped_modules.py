"""A module in a wrapper is the module: what knows parameters by name knows them there, too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import funshampoo as fs
from funshampoo.core.bare import bare_names
from tests.trees import assert_equal

Wrap = Callable[[nn.Sequential], nn.Module]


def model(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    sides = [width] * 3
    return nn.Sequential(*[nn.Linear(*sides[:2]) for _ in sides], nn.Linear(width, 2)).double()


def checkpointed(network: nn.Sequential) -> nn.Module:
    network[1] = checkpoint_wrapper(network[1])  # type: ignore[no-untyped-call]
    return network


WRAPPERS: dict[str, Wrap] = {
    "compiled": lambda network: torch.compile(network, backend="eager"),  # type: ignore[dict-item, return-value]
    "parallel": nn.DataParallel,
    "parallel and compiled": lambda n: nn.DataParallel(torch.compile(n, backend="eager")),  # type: ignore[arg-type]
    "checkpointed": checkpointed,
}


def steps(network: nn.Module, optimizer: Any, ts: range) -> list[torch.Tensor]:
    for t in ts:
        optimizer.zero_grad()
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(t)).double()
        network(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()]


def loads(wrap: Wrap) -> list[list[torch.Tensor]]:
    """From a checkpoint of the module into the wrapper, and the reverse, in another order."""
    found = []
    for here, there in ((wrap, lambda network: network), (lambda network: network, wrap)):
        network = here(model())
        optimizer = fs.Shampoo(network.named_parameters(), lr=0.05, every=2)
        steps(network, optimizer, range(3))
        other = there(model())
        with torch.no_grad():
            for p, q in zip(other.parameters(), network.parameters()):
                p.copy_(q)
        resumed = fs.Shampoo([*other.named_parameters()][::-1], lr=0.05, every=2)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found.append(steps(other, resumed, range(3, 7)))
    return found


def seeds(wrap: Wrap) -> list[list[torch.Tensor]]:
    network = model()
    adamw = torch.optim.AdamW([*network.named_parameters()], lr=0.01)
    steps(network, adamw, range(3))
    wrapped = wrap(network)
    optimizer = fs.Optimizer([*wrapped.named_parameters()][::-1], fs.adamw, lr=0.01)
    optimizer.seed_from_adamw(adamw.state_dict())
    return [steps(wrapped, optimizer, range(3, 7))]


def overrides(wrap: Wrap) -> list[list[torch.Tensor]]:
    patterns: Any = {"1.weight": {"lr": 0.2}, "1*": {"weight_decay": 0.3}}
    wrapped = wrap(model())
    optimizer = fs.for_model(wrapped, "shampoo", lr=0.05, other_lr=0.01, overrides=patterns)
    return [steps(wrapped, optimizer, range(4))]


def scales_rates(wrap: Wrap) -> list[list[torch.Tensor]]:
    found = []
    for narrow in (model(3), wrap(model(3))):
        wrapped = wrap(model())
        optimizer = fs.for_model(wrapped, "muon", lr=0.05, scale_rates="mup", base=narrow)
        found.append(steps(wrapped, optimizer, range(4)))
    return found


@pytest.mark.filterwarnings("ignore:'.*':UserWarning")  # of narrow layers, by `for_model`
@pytest.mark.parametrize("does", [loads, seeds, overrides, scales_rates])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_nothing(
    wrapper: str, does: Callable[[Wrap], list[list[torch.Tensor]]]
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*loaded by order")
        found = does(WRAPPERS[wrapper])
    for one, expected in zip(found, does(lambda network: network)):
        assert_equal(one, expected)


def test_names_that_would_be_one_stay_as_they_are() -> None:
    names = ["module.weight", "weight"]
    assert bare_names(names) == names
    assert bare_names(["a.module.weight", "b.weight", "b.weight"])[0] == "a.weight"
