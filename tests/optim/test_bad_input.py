"""What the wrapper is told that can't be stepped: a clear error, and no group has moved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import funshampoo as fs
from funshampoo import linalg
from tests.trees import assert_unchanged, snapshot


def two_groups(method: Any = fs.shampoo) -> tuple[nn.Sequential, fs.Optimizer]:
    """The second group is the one that gets what is wrong; both have had a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer = fs.Optimizer(groups, method, lr=0.1)
    backward(model)
    optimizer.step()
    backward(model)
    return model, optimizer


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()


def edit(**entries: Any) -> Callable[[Any, Any], None]:
    return lambda model, optimizer: optimizer.param_groups[1].update(entries)


def shape(model: Any, optimizer: Any) -> None:
    model[2].weight.data = torch.ones(7, 3)


def expanded(model: Any, optimizer: Any) -> None:
    model[2].weight.data = torch.ones(2, 1).expand(2, 4)


def integer(model: Any, optimizer: Any) -> None:
    model[2].weight.requires_grad_(False).data = torch.ones(2, 4, dtype=torch.int64)


def sparse(model: Any, optimizer: Any) -> None:
    model[2].weight.grad = model[2].weight.grad.to_sparse()


def complex_(model: Any, optimizer: Any) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": [p]})


STEPS: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "lr nan": (edit(lr=float("nan")), "lr is nan; it must lie in"),
    "lr negative": (edit(lr=-1.0), "lr is -1.0; it must lie in"),
    "lr a word": (edit(lr="0.1"), "lr is '0.1'; give one number"),
    "lr None": (edit(lr=None), "lr is None; expected a number"),
    "two rates": (edit(lr=torch.ones(2)), r"lr is a tensor of shape \(2,\); give one number"),
    "no value": (edit(lr=torch.tensor(0.1, device="meta")), "lr|learning_rate.* meta device"),
    "betas": (edit(betas=(0.9,)), r"betas is \(0.9,\); give the pair"),
    "maximize": (edit(maximize="yes"), "maximize is 'yes'; expected True or False"),
    "a parameter's shape": (shape, "its state can't follow; nothing was changed. Undo it"),
    "expanded": (expanded, r"'param_2' has several entries in one place.*clone\(\)"),
    "integers": (integer, "'param_2' is an integer or bool tensor.*Leave it out"),
    "sparse": (sparse, "gradient of 'param_2' is sparse.*sparse=False"),
    "complex": (complex_, "'param_4' is complex.*Leave it out"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_one_group_can_not_make(name: str) -> None:
    """The first group has not moved, its state neither, and it goes on once that is undone."""
    change, match = STEPS[name]
    model, optimizer = two_groups()
    saved = copy.deepcopy(optimizer.state_dict()["state"][0])
    weight = model[0].weight.detach().clone()
    change(model, optimizer)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match) as error:
        optimizer.step()
    assert not isinstance(error.value, fs.InterruptedStepError)
    assert torch.equal(model[0].weight, weight)
    del optimizer.param_groups[1:]
    found = optimizer.state_dict()["state"][0]
    assert all(torch.equal(found[key], x) for key, x in saved.items())
    optimizer.step()
    assert not torch.equal(model[0].weight, weight)


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


PARAMS: dict[str, tuple[Any, str]] = {
    "None": (None, r"params is None; give parameters, model.parameters\(\)"),
    "a module": (linear(), r"params is a Linear; give parameters.*for_model"),
    "a dict": (dict(linear().named_parameters()), r"params is a dict;.*or its items\(\)"),
    "nothing": ([], "empty parameter list"),
    "an empty generator": (iter([]), "empty parameter list"),
    "a tensor": (torch.ones(2), "should be an iterable of Tensors or dicts"),
    "a number": ([1.0], "can only optimize Tensors"),
    "a group without": ([{"lr": 0.1}], r"the group has no 'params', but \['lr'\]: give"),
    "a rate": ([{"params": linear().parameters(), "lr": -1.0}], "lr is -1.0"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_that_are_none(name: str) -> None:
    given, match = PARAMS[name]
    with pytest.raises((ValueError, TypeError), match=match):
        fs.Optimizer(given, fs.adamw, lr=0.1)


LOADS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "None": (lambda model: None, "state_dict is None; give what state_dict"),
    "a list": (lambda model: [1], r"state_dict is \[1\]; give"),
    "nothing": (lambda model: {}, "this is no state_dict of an optimizer"),
    "a model's": (lambda model: model.state_dict(), "this is no state_dict of an optimizer"),
    "another recipe's": (
        lambda model: two_groups(fs.sgd)[1].state_dict(),
        "does not fit the state; nothing was changed",
    ),
    "AdamW's": (
        lambda model: torch.optim.AdamW(
            [{"params": list(model[i].parameters())} for i in (0, 2)]
        ).state_dict(),
        "does not fit the state; nothing was changed",
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_what_can_not_be_loaded(name: str) -> None:
    make, match = LOADS[name]
    model, optimizer = two_groups()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.load_state_dict(make(model))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entries in before["state"].items():
        assert all(torch.equal(x, after["state"][i][key]) for key, x in entries.items())


def test_closures() -> None:
    model, optimizer = two_groups()
    weight = model[0].weight.detach().clone()
    with pytest.raises(TypeError, match="closure is 3; give a function"):
        optimizer.step(3)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(model[0].weight, weight)
    assert optimizer.step(lambda: None) is None
    assert not torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_make_the_same_step(how: str) -> None:
    model, optimizer = two_groups()
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        twin, other = two_groups()
        other.load_state_dict(torch.load(buffer, weights_only=True))
    for net, one in ((model, optimizer), (twin, other)):
        backward(net)
        one.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert p is not q
        assert torch.equal(p, q)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_edit_that_damps_a_pseudo_inverse_is_refused_as_at_construction(steps: int) -> None:
    """In either group, before the other one has moved."""
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2, 3))]

    def made(epsilon: float) -> fs.Optimizer:
        groups = [{"params": [p]} for p in params]
        solver = linalg.pseudo_inverse()
        return fs.Optimizer(groups, fs.shampoo, lr=0.1, every=2, epsilon=epsilon, solver=solver)

    message = "epsilon must be the number 0 for pseudo_inverse, got 0.1:"
    with pytest.raises(ValueError, match=message):
        made(0.1)
    optimizer = made(0.0)
    for p in params:
        p.grad = torch.arange(6.0).reshape(p.shape)
    for _ in range(steps):
        optimizer.step()
    for group in optimizer.param_groups:
        before = snapshot(params, optimizer.chain_states())
        group["epsilon"] = 0.1
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        group["epsilon"] = 0.0
        assert_unchanged(before, params, optimizer.chain_states())
    optimizer.step()


def scaled_by_value(learning_rate: float = 0.1) -> fs.GradientTransformation:
    """A recipe with a stage that needs a value of the caller's."""

    def update(updates: Any, state: Any, *, value: float) -> Any:
        return {name: u * value for name, u in updates.items()}, state

    stage = fs.GradientTransformation(lambda params: (), update)
    return fs.chain(stage, fs.scale_by_learning_rate(learning_rate))


def test_a_step_passes_on_the_values_that_stages_declare() -> None:
    """To the group whose method declares one; what nobody does is an error before any has moved."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups: list[Any] = [{"params": [params[0]], "method": scaled_by_value, "lr": 0.5}]
    groups.append({"params": [params[1]]})
    optimizer = fs.Optimizer(groups, fs.sgd, lr=0.5)
    for p in params:
        p.grad = torch.ones(2)
    for values, message in (
        ({}, "needs 'value'"),
        ({"value": 2.0, "vlaue": 3.0}, "no stage here knows 'vlaue'; did you mean 'value'"),
        ({"value": 2.0, "refresh": True}, "'refresh' is not the caller's to say here"),
    ):
        with pytest.raises(TypeError, match=message):
            optimizer.step(**values)
        assert all([torch.equal(p, torch.zeros(2)) for p in params])
    assert optimizer.step(lambda: 7.0, value=3.0) == 7.0
    torch.testing.assert_close(params[0].detach(), torch.full((2,), -1.5))
    torch.testing.assert_close(params[1].detach(), torch.full((2,), -0.5))
