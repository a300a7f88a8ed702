"""Errors in the caller's terms: other libraries' argument names, not those of our stages."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Built = TypeVar("Built")


def in_their_words(build: Callable[Arguments, Built]) -> Callable[Arguments, Built]:
    """`build`, with errors that name the offending argument, or field of a config in it.

    Stages use other names: SOAP's precondition_frequency is `every`. So after an error it is built
    again without each argument in turn: without the offending one the error changes, or is gone.

    Args:
        build: takes its arguments by keyword, each with a default.

    Raises:
        ValueError, TypeError: those of `build`, prefixed with the name if they lack it.

    >>> in_their_words(lambda rate="1": float(rate))(rate="fast")
    Traceback (most recent call last):
    ...
    ValueError: rate: could not convert string to float: 'fast'
    """

    @functools.wraps(build)
    def built(*args: Arguments.args, **given: Arguments.kwargs) -> Built:
        try:
            return build(*args, **given)
        except (ValueError, TypeError) as error:
            raise_naming(error, _at_fault(build, given, str(error)))

    return built


def raise_naming(error: ValueError | TypeError, name: str | None) -> NoReturn:
    """Raise the error itself, if it names this argument; else with the name in front.

    >>> raise_naming(ValueError("epsilon is -1"), "eps")
    Traceback (most recent call last):
    ...
    ValueError: eps: epsilon is -1
    """
    if name is None or re.search(rf"\b{re.escape(name)}\b", str(error)):
        raise error
    kind = ValueError if isinstance(error, ValueError) else TypeError
    raise kind(f"{name}: {error}") from error


def _at_fault(build: Callable[..., Any], given: Mapping[str, Any], found: str) -> str | None:
    """Last part of the path of the entry without which there is no error, or one unlike `found`.

    Of several, prefer the first whose value appears in the error, as it often does.
    """
    best, rank = None, (2, False)
    for path, value in _entries(given):
        error = _error_of(build, _without(given, path))
        here = (int(error != ""), repr(value) not in found)
        if error != found and here < rank:
            best, rank = path[-1], here
    return best


def _error_of(build: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """The error message if it can't be built; "" if it can."""
    try:
        build(**given)
    except Exception as error:  # of any type: only whether it is a different one matters
        return str(error) or repr(error)
    return ""


Path = tuple[str, ...]


def _entries(given: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All entries, inside and outside of configs, except the configs' types."""
    for name, value in given.items():
        if isinstance(value, Mapping) and value and all([isinstance(key, str) for key in value]):
            yield from _entries(value, (*path, name))
        elif name != "type":
            yield (*path, name), value


def _without(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    first, *rest = path
    left = {name: value for name, value in given.items() if name != first}
    return {**left, first: _without(given[first], tuple(rest))} if rest else left
