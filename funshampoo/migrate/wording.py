"""Errors in the words of whoever calls: names of other libraries' arguments, not of our stages."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Built = TypeVar("Built")


def in_their_words(build: Callable[Arguments, Built]) -> Callable[Arguments, Built]:
    """`build`, whose errors name the argument, or the field of a config in it, that is at fault.

    Stages know it by their own name: SOAP's precondition_frequency is `every`. At fault is what
    there is no error without, or else another one. So it is built again, without each in turn.

    Args:
        build: takes its arguments by keyword, each with a default.

    Raises:
        ValueError, TypeError: those of `build`, with the name in front where they do not have it.

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
            name = _at_fault(build, given, str(error))
            if name is None or re.search(rf"\b{re.escape(name)}\b", str(error)):
                raise
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name}: {error}") from error

    return built


def _at_fault(build: Callable[..., Any], given: Mapping[str, Any], found: str) -> str | None:
    """The last part of the path to what there is no error without, or another one than `found`.

    Of several the first is meant whose value the error has, as it often has.
    """
    best, rank = None, (2, False)
    for path, value in _entries(given):
        error = _error_of(build, _without(given, path))
        here = (int(error != ""), repr(value) not in found)
        if error != found and here < rank:
            best, rank = path[-1], here
    return best


def _error_of(build: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """What is said where it can't be built; "" where it can."""
    try:
        build(**given)
    except Exception as error:  # of whatever kind: that it is another one is all that counts
        return str(error) or repr(error)
    return ""


Path = tuple[str, ...]


def _entries(given: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All that stands in configs and outside of them, but for their types."""
    for name, value in given.items():
        if isinstance(value, Mapping) and value and all([isinstance(key, str) for key in value]):
            yield from _entries(value, (*path, name))
        elif name != "type":
            yield (*path, name), value


def _without(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    first, *rest = path
    left = {name: value for name, value in given.items() if name != first}
    return {**left, first: _without(given[first], tuple(rest))} if rest else left
