"""Hyperparameters in the state: readable, changeable between steps, batchable, scheduled."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.clock import new_counter
from funshampoo.core.contract import AnyRefreshes, GradientTransformation, State, Tree
from funshampoo.core.tree import flatten
from funshampoo.state.stages import HyperparamsState


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], static_args: Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    """Wrap a function that makes a transformation so that its numbers live in the state.

    A number given for an argument becomes a 0-dimensional float32 tensor in `state.hyperparams`; a
    tensor goes there as it is. So does the default of an argument that is not given, unless it is
    0, 1 or -1: such a default switches a part off (no momentum, no damping) and stays a number;
    give the argument to have it in the state. A function given for a number is a schedule: its
    value at the old count goes there, anew on every step. Everything else (ints such as `every`,
    bools, strings, None, solvers, masks, transformations) is static. On every update the factory is
    called with the tensors.

    Tensors leave the kernels that take numbers (1.7 times a plain step on forty small leaves): name
    what is never edited in `static_args`.

    Args:
        factory: e.g. `funshampoo.shampoo`.
        static_args: names of numbers that stay numbers.

    Returns:
        A function with the factory's signature.

    State: `HyperparamsState`. Between steps, replace an entry:
        state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(1e-4)})

    Raises:
        TypeError: the arguments do not fit the factory; static_args names none of them.
        ValueError: from update, `hyperparams` has other names than those that init made.

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
        given = set(bound.arguments)
        bound.apply_defaults()
        return _injected(factory, bound, given - static, set(bound.arguments) - given - static)

    return make


def _injected(
    factory: Callable[..., GradientTransformation],
    bound: inspect.BoundArguments,
    given: set[str],
    defaults: set[str],
) -> GradientTransformation:
    def is_injected(name: str, value: Any) -> bool:
        if name in given:
            return _is_number(bound, name, value)
        return name in defaults and isinstance(value, float) and abs(value) not in (0.0, 1.0)

    def is_schedule(name: str, value: Any) -> bool:
        return name in given and callable(value) and _takes_number(bound, name)

    numbers = {name: v for name, v in bound.arguments.items() if is_injected(name, v)}
    schedules = {name: v for name, v in bound.arguments.items() if is_schedule(name, v)}

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
        if state.hyperparams.keys() != numbers.keys() | schedules.keys():
            raise ValueError(
                f"state.hyperparams has {sorted(state.hyperparams)}; this transformation has "
                f"{sorted(numbers.keys() | schedules.keys())}."
            )
        edited = {name: _as_hyperparam(value) for name, value in state.hyperparams.items()}
        hyperparams = edited | scheduled(state.steps)
        out, inner = build(hyperparams).update(updates, state.inner, params, **context)
        return out, HyperparamsState(state.steps + 1, hyperparams, inner)

    refreshes = AnyRefreshes(lambda state: {"inner": build(state.hyperparams)})
    return GradientTransformation(init, update, name="inject_hyperparams", refreshes=refreshes)


def _takes_number(bound: inspect.BoundArguments, name: str) -> bool:
    """Whether a function given for this argument can only be a schedule."""
    parameter = bound.signature.parameters[name]
    if parameter.annotation is parameter.empty:
        return True
    annotation = str(parameter.annotation)
    return any(word in annotation for word in ("float", "Hyper", "Schedule"))


def _is_number(bound: inspect.BoundArguments, name: str, value: Any) -> bool:
    """A tensor, a float, or an int where a float may stand."""
    if isinstance(value, (Tensor, float)):
        return True
    annotation = str(bound.signature.parameters[name].annotation)
    return type(value) is int and any(word in annotation for word in ("float", "Hyper"))


def _as_hyperparam(value: Any, device: torch.device | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32, device=device)
