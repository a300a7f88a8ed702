"""What a user writes, for mypy: never run. A `type: ignore` marks what it has to find.

With --strict one that finds nothing is an error too.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple, assert_type

import torch
from torch import Tensor

import funshampoo as fs


class Net(NamedTuple):
    weight: Tensor
    bias: Tensor


def a_tree_keeps_its_type(grads: dict[str, Tensor], params: dict[str, Tensor], net: Net) -> None:
    tx = fs.shampoo(0.01)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert_type(updates, dict[str, Tensor])
    params = fs.apply_updates(params, updates)
    assert_type(fs.apply_updates(params, updates), dict[str, Tensor])
    assert_type(params["w"], Tensor)
    steps, state = fs.chain(tx, fs.scale(0.5)).update(net, state, net, donate=True, step=3)
    assert_type(steps, Net)
    assert_type(fs.apply_updates(net, steps).weight, Tensor)
    some: dict[str, Tensor | None] = {"w": None}
    assert_type(tx.update(some, state)[0], dict[str, Tensor | None])
    ordered = OrderedDict(w=params["w"])
    assert_type(fs.apply_updates(ordered, ordered), OrderedDict[str, Tensor])
    wrong: list[Tensor] = tx.update(grads, state)[0]  # type: ignore[assignment]
    other: list[Tensor] = fs.apply_updates(params, updates)  # type: ignore[arg-type]
    del wrong, other


def a_state_is_any(params: dict[str, Tensor]) -> None:
    tx = fs.inject_hyperparams(fs.adamw)(1e-3)
    state = tx.init(params)
    state = state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(0.1)})
    fs.update_in_place(tx, params, state, params)
    init, update = tx
    update(params, init(params))


def the_recipe_knows_its_options() -> None:
    fs.shampoo(0.1, momentum=0.9, grafting="rms", vectors="blocks", spike_factor=100.0)
    fs.shampoo(torch.tensor(0.1), beta2=torch.tensor(0.9), product_dtype=torch.bfloat16)
    fs.shampoo(fs.schedules.constant(0.1), solver=fs.linalg.by_device(), max_size=None)
    fs.shampoo(0.1, momentun=0.9)  # type: ignore[call-arg]
    fs.shampoo(0.1, grafting="adamw")  # type: ignore[arg-type]
    fs.shampoo(0.1, every=2.5)  # type: ignore[arg-type]
    fs.shampoo(0.1, solver=fs.linalg.eigh)  # type: ignore[arg-type]


def so_does_the_wrapper(model: torch.nn.Module) -> None:
    parameters = model.parameters()
    fs.Shampoo(parameters, lr=0.1, betas=(0.9, 0.99), momentum=0.9, nesterov=True, stagger=True)
    fs.Shampoo(model.named_parameters(), 0.1, compile={"mode": "max-autotune"}, maximize=True)
    fs.Shampoo([{"params": parameters, "lr": 0.1}], distribute=fs.sharded, packed=True)
    fs.Shampoo(parameters, distribute=functools.partial(fs.sharded, every=5), grafting=None)
    fs.Shampoo(parameters, solver=fs.linalg.eigh(relative_epsilon=1e-4), exponents={2: 0.5})
    fs.Shampoo(parameters, exponents="shampoo_squared", sides="smaller", statistics_every=2)
    fs.Shampoo(parameters, exponents=1 / 3, sides=lambda block: [d < 512 for d in block])
    fs.Shampoo(parameters, exponents="-1/4")  # type: ignore[arg-type]
    fs.Shampoo(parameters, sides="larger")  # type: ignore[arg-type]
    fs.Shampoo(parameters, momentun=0.9)  # type: ignore[call-arg]
    fs.Shampoo(parameters, learning_rate=0.1)  # type: ignore[call-arg]
    fs.Shampoo(parameters, beta1=0.9)  # type: ignore[call-arg]
    fs.Shampoo(parameters, grafting="adamw")  # type: ignore[arg-type]
    fs.Shampoo(parameters, packed="no")  # type: ignore[arg-type]
    fs.Shampoo(parameters, vectors="all")  # type: ignore[arg-type]
    fs.Shampoo(parameters, betas=0.9)  # type: ignore[arg-type]


def a_stage_of_ones_own(params: dict[str, Tensor]) -> None:
    def sign(updates: Any) -> Any:
        return {name: u.sign() for name, u in updates.items()}

    tx = fs.chain(fs.stateless(sign), fs.scale_by_learning_rate(0.1))
    assert_type(tx.update(params, tx.init(params))[0], dict[str, Tensor])
    fs.Optimizer(params.values(), lambda lr: fs.sgd(lr), lr=0.1)


def a_model_has_a_front_door(model: torch.nn.Module, params: dict[str, Tensor]) -> None:
    optimizer = fs.for_model(model, "soap", lr=0.1, other_lr=1e-3, weight_decay=0.1, compile=True)
    assert_type(optimizer, fs.Optimizer)
    fs.for_model(model, fs.muon, lr=torch.tensor(0.1), overrides={"*.qkv.weight": {"parts": 3}})
    fs.for_model(model, lr=0.1, scale_rates="mup", base={"w": (3, 2)}, method_roles=("matrix",))
    assert_type(fs.routing_table(optimizer).rows[0].name, str)
    fs.partition({"matrix": fs.soap(), "vector": fs.adamw()}, fs.roles(params, heads="each"))
    fs.shampoo(0.1, merge=fs.blocks.Stacked(axis=1, parts=3))
    fs.for_model(model, "soap")  # type: ignore[call-arg]
    fs.for_model(model, 3, lr=0.1)  # type: ignore[arg-type]
    fs.for_model(model, lr=0.1, method_roles=("matrices",))  # type: ignore[arg-type]
    fs.roles(model, heads="all")  # type: ignore[arg-type]
