"""Checks of static arguments, at construction. Tensors are never read: they may be traced."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.interrupted import tensors_of
from funshampoo.core.live import Live, initial
from funshampoo.core.tree import flatten


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    schedule: bool = False,
    infinite: bool = False,
) -> None:
    """Check that a number is between low and high; a tensor of one number passes unread.

    With `schedule`, a function passes too. Infinity only with `infinite`: for a limit, which it
    switches off; anything else it makes infinite or, times 0, NaN.

    Raises:
        ValueError: it is not. Names the parameter and the range.
        TypeError: neither a number nor such a tensor (nor a function, where allowed).
    """
    low_open = low_open or low == -math.inf
    high_open = high_open or (high == math.inf and not infinite)
    if isinstance(value, Live):
        ends: dict[str, Any] = {"low": low, "high": high, "infinite": infinite}
        ends |= {"low_open": low_open, "high_open": high_open}
        value.note(functools.partial(check_range, name, **ends))
        value = initial(value)
    if isinstance(value, Tensor) and value.ndim and value.numel() != 1:
        raise TypeError(
            f"{name} has the shape {tuple(value.shape)}; give a number or a 0-dimensional tensor."
        )
    if isinstance(value, Tensor) or (schedule and callable(value)):
        return
    if callable(value):
        raise TypeError(
            f"{name} is a function; to schedule it, wrap the recipe in inject_hyperparams(...)."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number or a 0-dimensional tensor.")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        range_ = _interval(low, high, low_open, high_open)
        raise ValueError(f"{name} is {value}; it must lie in {range_}.")


def check_rate(value: Any) -> None:
    """A learning rate, or its schedule, must be at least 0."""
    check_range("learning_rate", value, 0.0, schedule=True)


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    return f"{left}{low}, {high}{right}"


def interval_of(check: Any) -> str | None:
    """The range accepted by a check that a `Live` has noted: "[0.0, 1.0)"; None if unknown.

    >>> beta = Live("beta", 0.9)
    >>> check_range("beta2", beta, 0.0, 1.0, high_open=True)
    >>> interval_of(beta.checks[0])
    '[0.0, 1.0)'
    """
    known = check.keywords if isinstance(check, functools.partial) else {}
    low = known.get("low", known.get("least"))
    if low is None:
        return None
    opened = known.get("low_open", False), known.get("high_open", False)
    return _interval(low, known.get("high", math.inf), *opened)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that `value` is an int of at least `least`.

    Raises:
        TypeError, ValueError: name the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an int.")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


def check_step(value: Any) -> None:
    """Check a step number, from 1.

    Raises:
        TypeError, ValueError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"step is a {type(value).__name__}; pass a Python int that counts from 1.")
    if value < 1:
        raise ValueError(f"step is {value}; it counts from 1, as t does in the equations.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check that `value` is one of `choices`.

    Raises:
        ValueError: names the parameter and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def chosen(argument: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """Look up an argument's value in a table: another library's word, translated.

    Raises:
        ValueError: the table lacks it. Names the argument and its valid values.

    >>> chosen("adjust_lr", "rms_norm", {"rms_norm": "adam"})
    'adam'
    """
    check_choice(argument, value, tuple(table))
    return table[value]


def hint(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """A suggestion after an unknown name: the nearest one, if it is at least this similar.

    >>> hint("shampo", ["shampoo", "soap"]), hint("SOAP", ["soap"]), hint("x", ["soap"])
    ("; did you mean 'shampoo'?", "; did you mean 'soap'?", '.')
    """
    names = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=least)
    return f"; did you mean '{names[near[0]]}'?" if near else "."


def check_flag(name: str, value: Any) -> None:
    """Check that `value` is a bool.

    Raises:
        TypeError: names the parameter.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False.")


def check_entries(name: str, value: Any, number: int) -> None:
    """Check that `value` is a sequence of this length; its entries are not checked.

    Raises:
        ValueError: names the parameter.
    """
    if not (isinstance(value, Sequence) and len(value) == number):
        raise ValueError(f"{name} is {value!r}; it must have {number} entries.")


def check_flags(**flags: Any) -> None:
    """Check that all of these are bools.

    Raises:
        TypeError: names the first that is not.
    """
    for name, value in flags.items():
        check_flag(name, value)


def check_state(state: Any, name: str) -> None:
    """Raise TypeError, naming the stage, if its state contains anything but tensors.

    Or if these are in a container that optree knows and nothing else does, which would not save it.
    """
    leaves, spec = flatten(state)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"the state of '{name}' holds {leaf!r}, a {type(leaf).__name__}: checkpoints and "
                "vmap know tensors alone. Make it one, torch.tensor(...), and write () for what is "
                "not there."
            )
    if torch.compiler.is_dynamo_compiling() or len(tensors_of(state)) == len(leaves):
        return
    if kind := _unknown_in(spec):
        raise TypeError(
            f"the state of '{name}' has tensors in a {kind}, where checkpoints and guards do not "
            "find them: they know dicts, lists, tuples and named tuples. Make it one of these; if "
            "parameters are in one, give them as {name: tensor}."
        )


def _unknown_in(spec: Any) -> str:
    """The kind of a container that is none of these, or ""."""
    nodes = [spec]
    for node in nodes:  # it grows meanwhile
        if node.type is not None and not issubclass(node.type, (dict, list, tuple)):
            return str(node.type.__name__)
        nodes.extend(node.children())
    return ""
