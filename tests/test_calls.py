"""How much Python a plain step runs, for which small models wait: counted, not timed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.placed import SEEN
from tests.releases import wrong_before
from tests.sooner import these

MOST = 450
"""Of a pure plain step of Shampoo on two matrices and two vectors, which are four stacks."""

MOST_IN_PLACE = 550
"""Of a donated one, which also looks for what is left half done, and writes to the parameters."""

pytestmark = pytest.mark.skipif(
    sys.getprofile() is not None or sys.gettrace() is not None,
    reason="somebody else looks at the calls",
)


@pytest.fixture(autouse=True)
def without_dtensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process has had one, every leaf is asked whether it is one."""
    monkeypatch.setitem(SEEN, "any", False)


def calls(function: Callable[[], Any]) -> int:
    """How many functions of Python are called: of funshampoo, and below it of torch and optree.

    As sys.setprofile reports them: a comprehension is one up to Python 3.11, and so is a generator
    that goes on. What is written in C is none.
    """
    found = -1  # the function itself

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    gc.collect()
    gc.disable()  # finalizers of what earlier tests left are not the step's
    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def perceptron(copies: int = 1) -> dict[str, torch.Tensor]:
    shapes = {"w1": (64, 32), "b1": (64,), "w2": (10, 64), "b2": (10,)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.{i}": torch.randn(shape, generator=generator)
        for i in range(copies)
        for name, shape in shapes.items()
    }


def plain_steps(tx: fs.GradientTransformation, copies: int = 1) -> tuple[int, int]:
    """Calls of a pure step and of one in place, on steps without a refresh."""
    params, grads = perceptron(copies), perceptron(copies)
    state = tx.init(params)
    for _ in range(12):  # refreshes at 1 and 10; what is remembered is there by then
        _, state = tx.update(grads, state, params)
    pure = calls(lambda: tx.update(grads, state, params))
    state = fs.update_in_place(tx, grads, state, params)
    return pure, calls(lambda: fs.update_in_place(tx, grads, state, params))


def test_a_plain_step_of_shampoo() -> None:
    wrong_before("2.9", "the precision of products is read by calls of Python")
    pure, in_place = plain_steps(fs.shampoo(0.01))
    assert pure <= MOST
    assert in_place <= MOST_IN_PLACE


@pytest.mark.parametrize(
    "recipe",
    these([fs.shampoo, fs.soap, fs.adamw], sooner=[fs.shampoo, fs.adamw]),
    ids=lambda f: f.__name__,
)
def test_equal_parameters_add_no_calls(recipe: Any) -> None:
    """Work in Python goes with the stacks, not with the parameters: sixteen of each here."""
    few, many = plain_steps(recipe(0.01)), plain_steps(recipe(0.01), copies=16)
    assert max(b - a for a, b in zip(few, many)) <= 5  # norms of a long stack are read otherwise


def test_what_is_counted() -> None:
    def inner() -> None:
        len([])

    def outer() -> None:
        inner()
        sorted("ab", key=lambda x: x)

    assert calls(outer) == 3
    assert calls(lambda: torch.ones(2).add(1).numel()) == 0
