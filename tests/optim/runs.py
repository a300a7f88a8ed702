"""What the wrapper runs in these tests, and the functional loop that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import funshampoo as fs
from tests.trees import gradients, problem, tensors


class Method(NamedTuple):
    """A method, as the wrapper takes it and as a functional loop does.

    Attributes:
        method: None for the class fs.Shampoo.
        options: by the wrapper's names.
    """

    name: str
    method: Any
    options: dict[str, Any]

    def optimizer(self, params: Any, **changes: Any) -> fs.Optimizer:
        options = {**self.options, **changes}
        if self.method is None:
            return fs.Shampoo(params, **options)
        return fs.Optimizer(params, self.method, **options)

    def transformation(self, **changes: Any) -> fs.GradientTransformation:
        options = {**self.options, **changes}
        if isinstance(self.method, fs.GradientTransformation):
            return fs.chain(self.method, fs.scale_by_learning_rate(options["lr"]))
        if self.method is fs.from_reference:
            return fs.from_reference(**options)
        options["learning_rate"] = options.pop("lr")
        if "betas" in options:
            options["beta1"], options["beta2"] = options.pop("betas")
        return (self.method or fs.shampoo)(**options)


SHAMPOO = Method("shampoo", fs.shampoo, {"lr": 0.05, "every": 3, "max_size": 4})
EVERYTHING = Method(
    "shampoo_everything",
    fs.shampoo,
    {
        "lr": 0.05,
        "betas": (0.8, 0.95),
        "every": 3,
        "max_size": 4,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
    },
)
SGD = Method("sgd", fs.sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "dampening": 0.1})
ADAMW = Method("adamw", fs.adamw, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1})
REFERENCE = Method(
    "from_reference",
    fs.from_reference,
    {
        "lr": 0.05,
        "betas": (0.9, 0.99),
        "epsilon": 1e-4,
        "precondition_frequency": 3,
        "max_preconditioner_dim": 4,
        "grafting_config": {"type": "AdamPreconditionerConfig"},
        "iterate_averaging_config": {"type": "ClassicMomentumConfig", "momentum": 0.9},
        "use_pin_memory": True,  # of those that it takes as **keywords
    },
)
BARE = Method("bare", fs.chain(fs.scale_by_adam(0.8, 0.95), fs.trace(0.5)), {"lr": 0.05})
CLASS = Method("Shampoo", None, {"lr": 0.05, "every": 3, "max_size": 4, "weight_decay": 0.1})
METHODS = [EVERYTHING, SGD, ADAMW, REFERENCE, BARE, CLASS]

Named = dict[str, Parameter]
Grads = list[dict[str, Tensor]]


def name_of(method: Method) -> str:
    return method.name


def parameters(dtype: torch.dtype = torch.float64) -> Named:
    """By names whose order is not that of the alphabet, as a model's are."""
    return {f"p{5 - i}": Parameter(x.clone()) for i, x in enumerate(tensors(problem(0, dtype)))}


def grads_of(steps: int, dtype: torch.dtype = torch.float64, seed: int = 100) -> Grads:
    trees = gradients(steps, dtype, seed)
    return [{f"p{5 - i}": g for i, g in enumerate(tensors(tree))} for tree in trees]


def run(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], grads: Grads) -> None:
    """Step on these gradients; a parameter that a step does not name has none."""
    for step in grads:
        for name, p in params.items():
            p.grad = step[name].clone() if name in step else None
        optimizer.step()


def functional(
    changes: Sequence[tuple[fs.GradientTransformation, dict[str, Tensor]]],
    params: Mapping[str, Tensor],
    state: Any = None,
) -> tuple[dict[str, Tensor], Any]:
    """One step for every (transformation, gradients); the state is handed on.

    A stage that a transformation has and its predecessor lacked starts from nothing.
    """
    now = {name: p.detach().clone() for name, p in params.items()}
    before = None
    for tx, grads in changes:
        if tx is not before:
            state = tx.init(now) if state is None else _handed_on(tx.init(now), state)
        before = tx
        given = {name: grads.get(name) for name in now}
        updates, state = tx.update(given, state, now)
        now = fs.apply_updates(now, updates)
    return now, state


def _handed_on(fresh: Any, old: Any) -> Any:
    """The old state, with the stages that the fresh one has."""
    if isinstance(fresh, dict):
        return {k: _handed_on(v, old[k]) if k in old else v for k, v in fresh.items()}
    if isinstance(fresh, tuple) and hasattr(fresh, "_fields"):
        return type(fresh)(*[_handed_on(a, b) for a, b in zip(fresh, old)])
    return old


def assert_same(
    params: Mapping[str, Tensor], others: Mapping[str, Tensor], tolerance: float = 0.0
) -> None:
    """Parameters are equal bit by bit; or differ by at most `tolerance`."""
    assert params.keys() == others.keys()
    for name, p in params.items():
        difference = (p.detach() - others[name].detach()).abs().max()
        assert p.dtype == others[name].dtype
        assert float(difference) <= tolerance, f"{name} differs by {float(difference)}"


def copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def moved(params: Mapping[str, Tensor], since: Mapping[str, Tensor]) -> set[str]:
    return {name for name, p in params.items() if not torch.equal(p.detach(), since[name])}
