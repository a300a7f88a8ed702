"""A switch that is no bool is an error, in every public function: "no" would be taken for True."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import funshampoo as fs

FIRST: dict[str, list[Any]] = {
    "cautious": [fs.sign()],
    "decay_after_step": [0.1, 0.1],
    "guarded": [fs.sign()],
    "in_eigenbasis": [fs.sign()],
    "sharded": [fs.sign()],
}
SOLVERS = [name for name in fs.linalg.__all__ if name.islower()]
ELSEWHERE = {"for_model"}  # test_for_model.py


def switches() -> list[tuple[str, str]]:
    functions = {n: f for n in fs.__all__ if inspect.isfunction(f := getattr(fs, n))}
    functions |= {n: getattr(fs.linalg, n) for n in SOLVERS}
    return [
        (name, argument)
        for name, function in functions.items()
        if name not in ELSEWHERE
        for argument, parameter in inspect.signature(function).parameters.items()
        if str(parameter.annotation) == "bool"
    ]


def without_options(name: str, function: Callable[..., Any]) -> list[Any]:
    """What stands in the place of arguments without a default."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return FIRST.get(name, [0.1] * len(needed))


@pytest.mark.parametrize(("name", "argument"), switches())
def test_a_switch_is_a_bool(name: str, argument: str) -> None:
    function = getattr(fs.linalg if name in SOLVERS else fs, name)
    with pytest.raises(TypeError, match=f"{argument.removeprefix('use_')} is 'no'"):
        function(*without_options(name, function), **{argument: "no"})
