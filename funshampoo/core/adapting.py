"""Functions with less or more arguments than the contract has, made to fit it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from funshampoo.core.context import PLACES, Context, as_keywords

_CONTEXT = frozenset(PLACES)


class Adapted(NamedTuple):
    """An `update` as chains call it.

    Attributes:
        call: (updates, state, params, context) -> (updates, state).
        counts: whether it wants the number of the step.
        branches: whether it may do other things on some steps, by what the host knows.
        minds_alive: whether it knows what to do with rows whose gradient was not finite: it
            declares `alive`, has no state to spoil, or hands on its context.
        accepts: the names that are the caller's own; None: any.
        reads_hyper: whether it may read live numbers that nobody has named.
        reads_gradient: whether it may read the context's.
    """

    call: Callable[..., Any]
    counts: bool
    branches: bool
    minds_alive: bool
    accepts: frozenset[str] | None
    reads_hyper: bool
    reads_gradient: bool


class _Signature(NamedTuple):
    positional: int
    names: tuple[str, ...]  # of the positional ones
    keywords: frozenset[str]  # names that work as keywords
    variadic: bool  # has *args
    any_keyword: bool  # has **kwargs


def adapted_update(function: Callable[..., Any]) -> Adapted:
    """`function(updates, state, params=None, **context)`, which may leave out what it likes."""
    if isinstance(function, _WithoutState):
        return _adapted(function.function, 1)
    signature = _signature(function)
    if signature.positional == 4 and signature.names[3] == "context":
        return Adapted(function, False, False, True, frozenset(), True, True)
    return _adapted(function, 2)


def adapted_wrapping(function: Callable[..., Any]) -> Adapted:
    """`function(run, updates, own, params=None, **context)`; `call` gets `run` at the end."""
    return _adapted(function, 3)


def _adapted(function: Callable[..., Any], required: int) -> Adapted:
    """Of a function of (updates), (updates, state) or (run, updates, state), and what it likes."""
    positional, names, keywords, variadic, any_keyword = _signature(function)
    by_place = variadic or positional > required
    by_name = not by_place and ("params" in keywords or any_keyword)
    declared = keywords - set(names[: required + by_place]) - {"params"}
    fields = [(name, PLACES[name]) for name in sorted(declared & _CONTEXT)]
    own = declared - _CONTEXT - {"previous"}

    def call(updates: Any, state: Any, params: Any, context: Context, run: Any = None) -> Any:
        given = as_keywords(context) if any_keyword else {n: context[i] for n, i in fields}
        if context.extra and not any_keyword:
            given |= {name: x for name, x in context.extra.items() if name in own}
        if "previous" in declared:
            given["previous"] = context.previous
        if by_name:
            given["params"] = params
        arguments = (run, updates, state)[3 - required :] if required > 1 else (updates,)
        if by_place:
            arguments += (params,)
        result = function(*arguments, **given)
        return result if required > 1 else (result, state)

    return Adapted(
        call,
        counts=not declared.isdisjoint(("step", "clock")),
        branches=any_keyword or not declared.isdisjoint(("step", "refresh")),
        minds_alive=required == 1 or "alive" in declared,
        accepts=None if any_keyword else frozenset(own),
        reads_hyper=any_keyword or "hyper" in declared,
        reads_gradient=any_keyword or "gradient" in declared,
    )


class _WithoutState(NamedTuple):
    function: Callable[..., Any]


def without_state(function: Callable[..., Any]) -> Any:
    """The update of a stage that remembers nothing: function(updates, params=None, **context)."""
    return _WithoutState(function)


def adapted_flops(function: Callable[..., float] | None) -> Callable[..., float]:
    """`call(block, kept, apart)` of a function that may leave out the last, or of None."""
    if function is None:
        return lambda block, kept, apart: 0.0
    if "apart" in inspect.signature(function).parameters:
        return function
    return lambda block, kept, apart: function(block, kept)


def adapted_init(function: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """`call(params, context)` of a function that declares what it wants of the context."""
    _, _, keywords, _, any_keyword = _signature(function)

    def call(params: Any, context: Mapping[str, Any]) -> Any:
        unknown = sorted(context.keys() - {"upstream", "block_ndim", "clock"})
        if unknown:
            raise TypeError(f"init knows no '{unknown[0]}'.")
        return function(
            params, **{n: x for n, x in context.items() if any_keyword or n in keywords}
        )

    return call


def name_of(update: Callable[..., Any]) -> str:
    """`momentum` for the function `momentum.<locals>.update`; `stage` where there is no such."""
    if isinstance(update, _WithoutState):
        update = update.function
    code = getattr(update, "__code__", None)  # which torch.compile can read, unlike __qualname__
    qualified = code.co_qualname if code is not None else ""
    outer, _, own = qualified.rpartition(".<locals>.")
    name = (outer or own).rpartition(".")[2]
    return "stage" if name in ("", "update", "<lambda>") or name.startswith("_") else name


def _signature(function: Callable[..., Any]) -> _Signature:
    """What a function takes.

    A plain function is asked for its code object, which torch.compile can trace through where
    `inspect` can't: a factory may build transformations inside `update`.
    """
    if isinstance(function, types.FunctionType) and not hasattr(function, "__wrapped__"):
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return _Signature(
            code.co_argcount,
            names[: code.co_argcount],
            frozenset(names[code.co_posonlyargcount :]),
            bool(code.co_flags & inspect.CO_VARARGS),
            bool(code.co_flags & inspect.CO_VARKEYWORDS),
        )
    parameters = list(inspect.signature(function).parameters.values())
    kinds = [p.kind for p in parameters]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return _Signature(
        len(places),
        tuple(p.name for p in places),
        frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )
