"""Hyperparameters in the state: readable, changeable between steps, batchable, scheduled."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from funshampoo.base import GradientTransformation, State, Tree
from funshampoo.state.stages import HyperparamsState
from funshampoo.steps import new_counter
from funshampoo.tree import flatten


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], static_args: Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    """Wrap a function that makes a transformation so that its numbers live in the state.

    Of the arguments given and the defaults, a float becomes a 0-dimensional float32 tensor in
    `state.hyperparams`, and a tensor goes there as it is. A function given for a number (one whose
    annotation says float, Hyper or Schedule, or whose default is a float) is a schedule: its value
    at the old count goes there, anew on every step. Everything else (ints, bools, strings, None,
    transformations) is static. On every update the factory is called with the tensors.

    Args:
        factory: e.g. `funshampoo.shampoo`.
        static_args: names of floats that stay numbers. A number that changes what is built, such as
            beta2=1.0 (a plain sum) or momentum=0.0 (no momentum stage), needs this.

    Returns:
        A function with the factory's signature.

    State: `HyperparamsState`. Between steps, replace an entry:
        state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(1e-4)})

    Raises:
        TypeError: the arguments do not fit the factory; static_args names none of them.

    >>> from funshampoo import sgd
    >>> tx = inject_hyperparams(sgd)(learning_rate=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> state = tx.init(params)
    >>> state = state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(0.1)})
    >>> tx.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([-0.1000])}
    """
    signature = inspect.signature(factory)
    static = set(static_args)
    unknown = static - set(signature.parameters)
    if unknown:
        raise TypeError(f"static_args names {sorted(unknown)}, not arguments of the factory.")

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _injected(factory, bound, static)

    return make


def _injected(
    factory: Callable[..., GradientTransformation], bound: inspect.BoundArguments, static: set[str]
) -> GradientTransformation:
    given = {name: value for name, value in bound.arguments.items() if name not in static}
    numbers = {name: v for name, v in given.items() if isinstance(v, float | Tensor)}
    schedules = {name: v for name, v in given.items() if callable(v) and _takes_number(bound, name)}

    def build(hyperparams: dict[str, Tensor]) -> GradientTransformation:
        replaced = inspect.BoundArguments(bound.signature, OrderedDict(bound.arguments))
        replaced.arguments.update(hyperparams)
        return factory(*replaced.args, **replaced.kwargs)

    def scheduled(steps: Tensor) -> dict[str, Tensor]:
        return {name: _as_hyperparam(schedule(steps)) for name, schedule in schedules.items()}

    def init(params: Tree, **context: Any) -> HyperparamsState:
        steps = new_counter()
        device = next((x.device for x in flatten(params)[0] if isinstance(x, Tensor)), None)
        hyperparams = {name: _as_hyperparam(value, device) for name, value in numbers.items()}
        hyperparams |= scheduled(steps)
        return HyperparamsState(steps, hyperparams, build(hyperparams).init(params, **context))

    def update(
        updates: Tree, state: HyperparamsState, params: Tree = None, **context: Any
    ) -> tuple[Tree, State]:
        hyperparams = state.hyperparams | scheduled(state.steps)
        out, inner = build(hyperparams).update(updates, state.inner, params, **context)
        return out, HyperparamsState(state.steps + 1, hyperparams, inner)

    return GradientTransformation(init, update, name="inject_hyperparams")


def _takes_number(bound: inspect.BoundArguments, name: str) -> bool:
    parameter = bound.signature.parameters[name]
    annotation = str(parameter.annotation)
    says_so = any(word in annotation for word in ("float", "Hyper", "Schedule"))
    return says_so or isinstance(parameter.default, float)


def _as_hyperparam(value: Any, device: torch.device | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32, device=device)
