"""Hyperparameters in the state: readable, editable between steps, batchable, scheduled."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.applying import applied, apply_of
from funshampoo.core.checks import interval_of
from funshampoo.core.clock import advanced, new_counter, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.live import Live, is_live_argument, is_ours, signature_of, takes_live
from funshampoo.core.tree import flatten
from funshampoo.state.stages import HyperparamsState


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], static_args: Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    """Wrap a factory of transformations so that its numbers live in the state.

    A number given as an argument becomes a 0-dimensional float32 tensor in `state.hyperparams`; a
    tensor goes there unchanged. So does the default of an argument that is not given, unless it is
    0, 1 or -1: such a default switches a part off (no momentum, no damping) and stays a number;
    pass the argument to have it in the state. A function given for a number is a schedule: its
    value at the old count goes there, recomputed on every step. Everything else (ints such as
    `every`, bools, strings, None, solvers, masks, transformations) is static. Functions of
    funshampoo build their chain once, and look the numbers up on every step (`core.live`). Another
    factory is called with the tensors on every update, which torch.compile traces anew each time,
    unless its attribute `takes_live` is True. That promises that its numbers have the type float,
    and that it only passes them on, to such functions or to stages that read them by `number`.

    Tensors bypass the kernels that take numbers (1.7 times a plain step on forty small leaves):
    list what is never edited in `static_args`.

    Args:
        factory: e.g. `funshampoo.shampoo`.
        static_args: names of numbers that stay numbers.

    Returns:
        A function with the factory's signature.

    State: `HyperparamsState`. Between steps, replace an entry:
        state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(1e-4)})

    Raises:
        TypeError: factory is no function; the arguments do not fit it; static_args names none of
            them; a number of `from_published`, called without a `functools.partial` that fixes the
            method; one without a type in a factory whose attribute `takes_live` is True.
            From update, an entry of `hyperparams` is no number, or has another shape.
        ValueError: from update, `hyperparams` has other names than those that init made.

    >>> from funshampoo import sgd
    >>> tx = inject_hyperparams(sgd)(learning_rate=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> state = tx.init(params)
    >>> state = state._replace(hyperparams=state.hyperparams | {"learning_rate": torch.tensor(0.1)})
    >>> tx.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([-0.1000])}
    """
    if not callable(factory):
        raise TypeError(
            f"factory is {factory!r}; give the function that makes it: inject_hyperparams(f)(0.1)."
        )
    signature = signature_of(factory)
    static = set(static_args)
    unknown = static - set(signature.parameters)
    if unknown and _naming(signature, ()) is signature:  # it takes no further keywords
        raise TypeError(f"static_args names {sorted(unknown)}, not arguments of the factory.")

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = _naming(signature, kwargs).bind(*args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        others = set(bound.arguments) - given - static
        return _injected(_recipe(factory, bound, given - static, others))

    return make


def _naming(signature: inspect.Signature, given: Iterable[str]) -> inspect.Signature:
    """The signature with its own parameter for each given name that **keywords would take."""
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(known) == len(signature.parameters):
        return signature
    taken = {p.name for p in known if p.kind is not p.POSITIONAL_ONLY}
    further = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in given if n not in taken
    ]
    return signature.replace(parameters=[*known, *further])


@dataclass(frozen=True)
class _Recipe:
    """A factory with its arguments, and which of them are in the state.

    Attributes:
        numbers: {name: first value} of those that a user may edit there.
        schedules: {name: function of the old count}.
        live: whether the factory takes a `Live` in a number's place.
    """

    factory: Callable[..., GradientTransformation]
    bound: inspect.BoundArguments = field(repr=False)  # `init` does not read it
    numbers: Mapping[str, Any]
    schedules: Mapping[str, Any]
    live: bool

    def build(self, hyperparams: Mapping[str, Any]) -> GradientTransformation:
        """The chain with these values in place of its numbers."""
        replaced = inspect.BoundArguments(self.bound.signature, OrderedDict(self.bound.arguments))
        replaced.arguments.update(hyperparams)
        return as_transformation(self.factory(*replaced.args, **replaced.kwargs))

    def scheduled(self, steps: Tensor | None) -> dict[str, Tensor]:
        """The values of the schedules after this many steps."""
        return {name: _as_hyperparam(schedule(steps)) for name, schedule in self.schedules.items()}

    def first(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The hyperparameters before the first step."""
        numbers = {name: _as_hyperparam(value, device) for name, value in self.numbers.items()}
        return numbers | self.scheduled(new_counter())


def _recipe(
    factory: Callable[..., GradientTransformation],
    bound: inspect.BoundArguments,
    given: set[str],
    defaults: set[str],
) -> _Recipe:
    """Decide which arguments go into the state; `given` and `defaults` name the candidates."""
    live = takes_live(factory)
    numbers: dict[str, Any] = {}
    schedules: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if live and not is_live_argument(factory, parameter):
            if parameter.annotation is parameter.empty and isinstance(value, (Tensor, float)):
                what, remedy = "has no type in", f"takes_live is True, so declare {name}: float"
                if is_ours(factory):
                    what = "is one of many keywords of"
                    remedy = "fix what says which, as in functools.partial(from_published, 'SOAP')"
                raise TypeError(
                    f"{name} {what} {factory.__name__}, so it can't be injected: {remedy}."
                )
            continue
        annotation = str(parameter.annotation)
        may_be_float = "float" in annotation or "Hyper" in annotation
        untyped = parameter.annotation is parameter.empty
        may_be_scheduled = untyped or may_be_float or "Schedule" in annotation
        if name in defaults:
            injected = isinstance(value, float) and abs(value) not in (0.0, 1.0)
        else:
            is_int = type(value) is int and may_be_float
            injected = name in given and (is_int or isinstance(value, (Tensor, float)))
        if injected:
            numbers[name] = value
        elif name in given and callable(value) and may_be_scheduled:
            schedules[name] = value
    return _Recipe(factory, bound, numbers, schedules, live)


def _injected(recipe: _Recipe) -> GradientTransformation:
    # A tensor in the state switches nothing on or off, whatever its value.
    first, live = recipe.first(), recipe.live
    looked_up = {name: Live(name, v) for name, v in first.items()} if live else {}
    inner = recipe.build(looked_up or first)
    ranges = {name: _ranges(x) for name, x in looked_up.items()}
    counts = inner.counts or bool(recipe.schedules)

    def init(params: Tree, *, clock: bool = False, **context: Any) -> HyperparamsState:
        device = next((x.device for x in flatten(params)[0] if isinstance(x, Tensor)), None)
        state = inner.init(params, clock=clock or counts, **context)
        return HyperparamsState(started(counts, clock), recipe.first(device), state, ranges)

    def update(
        updates: Tree,
        state: HyperparamsState,
        params: Tree,
        context: Context,
        *,
        in_place: bool = False,
    ) -> tuple[Tree, State]:
        if state.hyperparams.keys() != first.keys():
            raise ValueError(
                f"state.hyperparams has {sorted(state.hyperparams)}; this transformation has "
                f"{sorted(first)}. An argument is there if it is a number, not in static_args, and "
                "given, or its default is a float other than 0, 1 and -1."
            )
        inside = running(state.steps, context)
        edited = {name: _edited(name, x, first[name]) for name, x in state.hyperparams.items()}
        values = edited | recipe.scheduled(inside.clock)
        tx = inner if live else recipe.build(values)
        if live:
            inside = changed(inside, hyper={**inside.hyper, **values})
        step = updates, state.inner, params, inside
        out, new = (None, applied(tx, *step)) if in_place else tx.run(*step)
        steps = advanced(state.steps, context.donate)
        return out, changed(state, steps=steps, hyperparams=values, inner=new)

    found = GradientTransformation(
        init,
        update,
        "inject_hyperparams",
        apply=apply_of(update) if inner.apply else None,
        parts={"inner": inner},
        counts=counts,
        passes=inner.passes,
        casts=inner.casts,
    )
    if found.live is not None:  # the caller can't pass those that are in the state
        found.live -= first.keys()
    return found


def _ranges(live: Live) -> dict[str, tuple[()]]:
    """The ranges of its values that the stages reading it declare, as keys."""
    found = dict.fromkeys([interval_of(check) for check in live.checks])
    return {range_: () for range_ in found if range_ is not None}


def _edited(name: str, value: Any, first: Tensor) -> Tensor:
    """A hyperparameter from the state, where a user may have put anything."""
    known = isinstance(value, Tensor) or (isinstance(value, Real) and not isinstance(value, bool))
    found = _as_hyperparam(value) if known else None
    if found is None or found.shape != first.shape:
        seen = repr(value) if found is None else f"of the shape {tuple(found.shape)}"
        raise TypeError(
            f"state.hyperparams['{name}'] is {seen}; it has the shape {tuple(first.shape)}: "
            "give a tensor of that shape, as torch.tensor(0.1) for a number."
        )
    return found


def _as_hyperparam(value: Any, device: torch.device | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32, device=device)
