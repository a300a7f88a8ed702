"""State is made for later steps, whatever mode its maker is called in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.tree import flatten
from funshampoo.recipes import RECIPES
from funshampoo.state import Checkpoint, load_state_dict, seed_from_adamw, state_dict
from tests.optim.runs import (
    ADAMW,
    SGD,
    SHAMPOO,
    Method,
    grads_of,
    name_of,
    parameters,
    run,
)

Optimizer = torch.optim.Optimizer


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def edit(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params.append(params.pop(0))
    optimizer.state_dict()


def leave_and_return(optimizer: Any) -> None:
    p = optimizer.param_groups[0]["params"].pop(0)
    optimizer.chain_states()
    optimizer.add_param_group({"params": [p]})
    optimizer.state_dict()


def delete(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]
    optimizer.state_dict()


def delete_an_entry(optimizer: Any) -> None:
    entries = next(iter(optimizer.state.values()))
    del entries[next(name for name in entries if not name.startswith("shared/"))]


def write(optimizer: Any) -> None:
    entries = next(iter(optimizer.state.values()))
    for name, x in entries.items():
        entries[name] = x.clone()


def assign(optimizer: Any) -> None:
    optimizer.state = {
        p: {name: x.clone() for name, x in entries.items()}
        for p, entries in optimizer.state.items()
    }
    optimizer.state_dict()


def write_to_what_has_left(optimizer: Any) -> None:
    p = optimizer.param_groups[0]["params"].pop(0)
    optimizer.state[p].update({name: x.clone() for name, x in optimizer.state[p].items()})
    optimizer.add_param_group({"params": [p]})
    optimizer.state_dict()


def seed(optimizer: Any) -> None:
    with torch.inference_mode(False):
        twins = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        old = torch.optim.AdamW([torch.nn.Parameter(x) for x in twins])
        for p in old.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        old.step()
    optimizer.seed_from_adamw(old.state_dict())


WAYS = [load, edit, leave_and_return, delete, delete_an_entry, write, assign]
WAYS.append(write_to_what_has_left)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("method", [SHAMPOO, ADAMW, SGD], ids=name_of)
def test_the_wrapper(method: Method, way: Callable[[Any], None]) -> None:
    """The steps after it are those after the same in no mode at all, to the bit."""
    if method is SGD and way is delete_an_entry:
        method = Method("sgd", fs.sgd, {"lr": 0.1, "momentum": 0.9})
    found = []
    for inference in (True, False):
        params, grads = parameters(), grads_of(3)
        optimizer = method.optimizer(params.values())
        run(optimizer, params, grads[:1])
        with torch.inference_mode(inference), torch.no_grad():
            way(optimizer)
        assert not _inference_tensors(optimizer.chain_states())
        run(optimizer, params, grads[1:])
        found.append([p.detach() for p in params.values()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("method", [SHAMPOO, ADAMW], ids=name_of)
def test_seeding(method: Method) -> None:
    params = parameters()
    optimizer = method.optimizer(params.values())
    with torch.inference_mode():
        seed(optimizer)
    assert not _inference_tensors(optimizer.chain_states())
    run(optimizer, params, grads_of(2))


def _inference_tensors(state: Any) -> int:
    return sum(x.is_inference() for x in flatten(state)[0])


FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "init": lambda tx, params, state: tx.init(params),
    "load_state_dict": lambda tx, params, state: load_state_dict(state, state_dict(state)).state,
    "seed_from_adamw": lambda tx, params, state: seed_from_adamw(state, _adamw(params), ["w"]),
    "Checkpoint": lambda tx, params, state: _through_dcp(state),
}


def _adamw(params: Any) -> Any:
    zeros = torch.zeros_like(params["w"])
    entry = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros + 1}
    return {
        "state": {0: entry},
        "param_groups": [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}],
    }


def _through_dcp(state: Any) -> Any:
    checkpoint = Checkpoint(state)
    checkpoint.load_state_dict(checkpoint.state_dict())
    return checkpoint.state


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("recipe", [fs.shampoo, fs.adamw, fs.soap, fs.muon, fs.splus])
def test_functions(recipe: Any, make: Callable[[Any, Any, Any], Any]) -> None:
    tx, params = recipe(0.1), {"w": torch.ones(4, 3)}
    state = tx.init(params)
    if make is FUNCTIONS["seed_from_adamw"] and recipe in (fs.muon, fs.splus, fs.soap):
        pytest.skip("it takes no moments of AdamW's for a matrix")
    with torch.inference_mode():
        state = make(tx, params, state)
    assert not _inference_tensors(state)
    for _ in range(2):
        state = fs.update_in_place(tx, {"w": torch.ones(4, 3)}, state, params)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step(name: str) -> None:
    """Those after it continue from what it has made, bases and averages in them, to the bit."""
    found = []
    for inference in (True, False):
        params, grads = parameters(), grads_of(4)
        optimizer = fs.Optimizer(params.values(), RECIPES[name], lr=0.01)
        for t, step in enumerate(grads):
            with torch.inference_mode(inference and t in (0, 2)):
                run(optimizer, params, [step])
        assert not _inference_tensors(optimizer.chain_states())
        found.append([p.detach() for p in params.values()])
    assert all(map(torch.equal, *found))


@torch.inference_mode()
def test_steps_of_what_belongs_to_inference_mode() -> None:
    """Nobody else may write to such parameters, or to the states that `update` makes there."""
    tx, params = fs.soap(0.1, every=1), {"w": torch.ones(4, 3)}
    assert params["w"].is_inference()
    _, state = tx.update({"w": torch.ones(4, 3)}, tx.init(params), params)
    fs.update_in_place(tx, {"w": torch.ones(4, 3)}, state, params)
    assert not torch.equal(params["w"], torch.ones(4, 3))


@pytest.mark.parametrize("recipe", [fs.shampoo, fs.adamw])
def test_what_is_loaded_is_no_function_of_what_was_saved(recipe: Any) -> None:
    tx, params = recipe(0.1), {"w": torch.ones(3, 2)}
    gradient = torch.ones(3, 2, requires_grad=True)
    _, state = tx.update({"w": gradient}, tx.init(params), params)
    assert any(x.requires_grad for x in flatten(state)[0])
    loaded = load_state_dict(tx.init(params), state_dict(state)).state
    assert not any(x.requires_grad for x in flatten(loaded)[0])
