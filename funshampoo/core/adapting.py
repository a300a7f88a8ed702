"""Adapting functions with fewer or more arguments to the contract."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from funshampoo.core.checks import hint
from funshampoo.core.context import PLACES, Context, as_keywords

_CONTEXT = frozenset(PLACES)
_OF_INIT = frozenset(("upstream", "block_ndim", "clock"))  # what an init may declare
_OTHER_WORDS = frozenset(("late", "live", "lock", "part", "row", "steps", "stream"))  # though near
_PLACES = {1: ("updates",), 2: ("updates", "state"), 3: ("run", "updates", "own")}


class Adapted(NamedTuple):
    """An `update` with the signature that chains call.

    Attributes:
        call: (updates, state, params, context) -> (updates, state).
        counts: whether it needs the step number.
        branches: whether it may behave differently on some steps, based on what the host knows.
        minds_alive: whether it handles rows whose gradient was not finite: it declares `alive`, has
            no state to corrupt, or passes its context on.
        accepts: the caller's own names that it takes; None: any.
        wants: those without a default, that it can't do without.
        reads_hyper: whether it may read live numbers that it does not declare.
        reads_gradient: whether it may read the context's `gradient`.
        needs_params: whether its parameters have no default, unless it takes the whole context.
    """

    call: Callable[..., Any]
    counts: bool
    branches: bool
    minds_alive: bool
    accepts: frozenset[str] | None
    wants: frozenset[str]
    reads_hyper: bool
    reads_gradient: bool
    needs_params: bool


class _Signature(NamedTuple):
    positional: int
    names: tuple[str, ...]  # of the positional parameters
    keywords: frozenset[str]  # parameters that can be passed as keywords
    variadic: bool  # has *args
    any_keyword: bool  # has **kwargs
    required: frozenset[str]  # parameters without a default


def adapted_update(function: Callable[..., Any], accepts: Collection[str] | None = ()) -> Adapted:
    """Adapt `function(updates, state, params=None, **context)`, which may omit any context.

    Args:
        accepts: names that are the caller's own, however near to the context's.
    """
    if isinstance(function, _WithoutState):
        return _adapted(function.function, 1, accepts)
    signature = _signature(function)
    if signature.positional == 4 and signature.names[3] == "context":
        return Adapted(function, False, False, True, frozenset(), frozenset(), True, True, False)
    return _adapted(function, 2, accepts)


def adapted_wrapping(function: Callable[..., Any]) -> Adapted:
    """`function(run, updates, own, params=None, **context)`; `call` gets `run` as last argument."""
    return _adapted(function, 3)


def _adapted(
    function: Callable[..., Any], required: int, accepts: Collection[str] | None = ()
) -> Adapted:
    """Adapt a function of (updates), (updates, state) or (run, updates, state), and any context."""
    check_places(function, "update", _PLACES[required])
    positional, names, keywords, variadic, any_keyword, without_default = _signature(function)
    if "context" in keywords:
        raise TypeError(
            f"{_shown(function, 'update')}: the whole context is the fourth parameter of "
            "update(updates, state, params, context) alone; elsewhere declare names of it."
        )
    by_place = variadic or positional > required
    by_name = not by_place and ("params" in keywords or any_keyword)
    weights = {"params"} if by_name else set(names[required : required + by_place])
    declared = keywords - set(names[: required + by_place]) - {"params"}
    fields = [(name, PLACES[name]) for name in sorted(declared & _CONTEXT)]
    own = declared - _CONTEXT - {"previous"}
    others = own.difference(accepts or ())
    remedy = " Give a value of the caller's another name"
    remedy += ", or name it in accepts=[...]." * (required < 3) or "."  # `wrapping` has none
    _check_spelling(function, "update", others, (*PLACES, "previous"), remedy)

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
        wants=frozenset(own & without_default),
        reads_hyper=any_keyword or "hyper" in declared,
        reads_gradient=any_keyword or "gradient" in declared,
        needs_params=not any_keyword and not weights.isdisjoint(without_default),
    )


class _WithoutState(NamedTuple):
    function: Callable[..., Any]


def without_state(function: Callable[..., Any]) -> Any:
    """The update of a stateless stage: function(updates, params=None, **context)."""
    return _WithoutState(function)


def adapted_flops(function: Callable[..., float] | None) -> Callable[..., float]:
    """`call(block, kept, apart)` for a function that may omit the last, or for None."""
    if function is None:
        return lambda block, kept, apart: 0.0
    signature = _signature(function)
    keywords = signature.keywords
    _check_spelling(function, "flops", keywords.difference(signature.names[:2]), ("apart",))
    if "apart" in keywords:
        return function
    return lambda block, kept, apart: function(block, kept)


def adapted_init(function: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """`call(params, context)` for a function that declares the context it needs."""
    check_places(function, "init", ("params",), _OF_INIT)
    signature = _signature(function)
    known, any_keyword = signature.keywords, signature.any_keyword
    _check_spelling(function, "init", known.difference(signature.names[:1]), _OF_INIT)

    def call(params: Any, context: Mapping[str, Any]) -> Any:
        unknown = sorted(context.keys() - _OF_INIT)
        if unknown:
            raise TypeError(f"init knows no '{unknown[0]}'.")
        declared = {n: x for n, x in context.items() if any_keyword or n in known}
        return function(params, **declared)

    return call


def check_places(
    function: Callable[..., Any],
    role: str,
    given: Collection[str],
    further: Collection[str] | None = None,
    remedy: str = "",
) -> None:
    """Check that a function of the user's can be called with these arguments by place.

    Args:
        role: what it is, for the error.
        further: the names that it may require besides; None: any.

    Raises:
        TypeError: it takes fewer arguments, or requires others.
    """
    try:
        signature = _signature(function)
    except ValueError:  # a builtin does not tell
        return
    others = signature.required.difference(signature.names[: len(given)])
    few = signature.positional < len(given) and not signature.variadic
    if few or (further is not None and not others.issubset(further)):
        called = f"it is called with ({', '.join(given)})"
        raise TypeError(f"{_shown(function, role)}; {called}{remedy and ': '}{remedy}.")


def _check_spelling(
    function: Callable[..., Any],
    role: str,
    own: Collection[str],
    known: Collection[str],
    remedy: str = "",
) -> None:
    """Check that no name is nearly one that it would get: it would silently keep its default.

    What a partial gives is asked of nobody.

    Raises:
        TypeError: one is.
    """
    if torch.compiler.is_dynamo_compiling():  # which has seen it built before
        return
    bound = function.keywords if isinstance(function, functools.partial) else ()
    for name in sorted(set(own).difference(known, _OTHER_WORDS, bound)):
        near = hint(name, known, least=0.85)
        if near != ".":
            raise TypeError(
                f"{_shown(function, role)}: the library passes no '{name}'{near}{remedy}"
            )


def _shown(function: Callable[..., Any], role: str) -> str:
    return f"{role} is {getattr(function, '__name__', 'a function')}{inspect.signature(function)}"


def name_of(update: Callable[..., Any]) -> str:
    """`momentum` for the function `momentum.<locals>.update`; `stage` if there is no such name."""
    code = getattr(update, "__code__", None)  # torch.compile can read it, unlike __qualname__
    qualified = code.co_qualname if code is not None else ""
    outer, _, own = qualified.rpartition(".<locals>.")
    name = (outer or own).rpartition(".")[2]
    return "stage" if name in ("", "update", "<lambda>") or name.startswith("_") else name


def _signature(function: Callable[..., Any]) -> _Signature:
    """The parameters of a function.

    For a plain function or method it reads the code object, which torch.compile can trace where it
    can't trace `inspect`: a factory may build transformations inside `update`.
    """
    plain: Any = function
    bound = 0  # the first parameter that a caller gives
    if isinstance(function, types.MethodType):
        plain, bound = function.__func__, 1
    if isinstance(plain, types.FunctionType) and not hasattr(plain, "__wrapped__"):
        code = plain.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if torch.compiler.is_dynamo_compiling():  # which can't read defaults, where none is missed
            optional = frozenset(names)
        else:
            first = code.co_argcount - len(plain.__defaults__ or ())
            optional = frozenset([*names[first : code.co_argcount], *(plain.__kwdefaults__ or ())])
        return _Signature(
            code.co_argcount - bound,
            names[bound : code.co_argcount],
            frozenset(names[max(bound, code.co_posonlyargcount) :]),
            bool(code.co_flags & inspect.CO_VARARGS),
            bool(code.co_flags & inspect.CO_VARKEYWORDS),
            frozenset(names[bound:]).difference(optional),
        )
    every = inspect.signature(function).parameters.values()
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    kinds, parameters = [p.kind for p in every], [p for p in every if p.kind not in variable]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return _Signature(
        len(places),
        tuple(p.name for p in places),
        frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
        frozenset(p.name for p in parameters if p.default is p.empty),
    )
