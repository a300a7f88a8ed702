"""torch.compile: how many graphs, the same numbers, on the whole recipe."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import OrderedDict, defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import funshampoo as fs
from tests.releases import MESSAGE, wrong_before
from tests.trees import assert_close

pytestmark = pytest.mark.slow

STEPS = 30


def params() -> dict[str, Any]:
    """Keys that are not in alphabetical order: traversals inside and outside must agree."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (6, 5), "bias": (5,), "a": (2, 3, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def optimizer() -> fs.GradientTransformation:
    schedule = fs.schedules.warmup_cosine(0.1, 5, STEPS)
    return fs.shampoo(schedule, max_size=5, momentum=0.9, nesterov=True, weight_decay=0.1)


def gradient(t: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + t)
    return {k: torch.randn(p.shape, generator=generator) for k, p in params().items()}


def graphs_of(context: Any) -> int:
    """Train compiled and plainly; the parameters agree. Returns the number of graphs compiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    tx = optimizer()
    compiled = torch.compile(tx.update, fullgraph=True, backend=counter)
    p, q = params(), params()
    state, other = tx.init(p), tx.init(q)
    for t in range(1, STEPS + 1):
        updates, state = compiled(gradient(t), state, p, **context(t))
        p = fs.apply_updates(p, updates)
        updates, other = tx.update(gradient(t), other, q, **context(t))
        q = fs.apply_updates(q, updates)
    assert_close(p, q, 1e-4)
    assert not torch.allclose(p["w"], params()["w"], atol=0.1)
    return counter.frame_count


def test_one_graph_for_30_plain_steps_with_a_schedule() -> None:
    assert graphs_of(lambda t: {"refresh": False}) == 1


def test_two_graphs_where_a_bool_says_which_steps_refresh() -> None:
    assert graphs_of(lambda t: {"refresh": fs.refresh_due(t, every=10)}) == 2


def test_a_few_graphs_where_the_step_is_an_int() -> None:
    """The first step, a plain step and a refresh; none of the later 27 is compiled again."""
    assert graphs_of(lambda t: {"step": t}) <= 4


@pytest.mark.parametrize(
    "container",
    [dict, OrderedDict, partial(defaultdict, None)],
    ids=["dict", "OrderedDict", "defaultdict"],
)
def test_the_order_of_parameters_is_that_outside(container: Any) -> None:
    """Equal shapes in an order that is not alphabetical: rows of stacks must not be swapped."""
    wrong_before("2.10", "a graph makes no defaultdict", isinstance(container, partial))
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    p, g = (
        container([(k, torch.randn(3, 4, generator=generator)) for k in ("z", "a", "m")])
        for _ in range(2)
    )
    tx = fs.shampoo(0.1, every=2, momentum=0.9)
    _, state = tx.update(g, tx.init(p), p)
    compiled = torch.compile(tx.update, fullgraph=True, backend="eager")
    updates, new = compiled(g, state, p, refresh=False)
    expected, after = tx.update(g, state, p, refresh=False)
    assert type(updates) is type(expected)
    assert_close(updates, expected, 1e-6)
    assert_close(new, after, 1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo cannot trace optree")  # 2.8
def test_gradients_that_do_not_fit_the_state_are_an_error_here_too() -> None:
    torch._dynamo.reset()
    tx = fs.blocked(fs.trace(0.9))
    state = tx.init({"a": torch.ones(2), "b": torch.ones(3)})
    compiled = torch.compile(tx.update, backend="eager")
    with pytest.raises(Exception, match="fit the state"):
        compiled({"a": torch.ones(3), "b": torch.ones(2)}, state)


def test_without_either_the_error_says_what_to_pass() -> None:
    wrong_before("2.10", MESSAGE)
    torch._dynamo.reset()
    tx = optimizer()
    compiled = torch.compile(tx.update, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"compiled\(tx\).*\s+refresh=funshampoo.refresh_due"):
        compiled(gradient(1), tx.init(params()), params())


def test_warnings_as_errors_end_no_step() -> None:
    """Inductor imports code of torch's that warns of itself. In a process that has not yet."""
    script = """
import sys
from funshampoo.combinators.compilation import _compiled
_compiled(lambda *step: None, {})
assert "torch._inductor.fx_passes.pre_grad" not in sys.modules
import torch._inductor.compile_fx
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=300)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers() -> None:
    torch._dynamo.reset()
    tx, p = optimizer(), params()
    state = tx.init(p)
    _, state = tx.update(gradient(1), state, p)
    compiled = torch.compile(tx.update, fullgraph=True)
    expected, after = tx.update(gradient(2), state, p, refresh=False)
    updates, new = compiled(gradient(2), state, p, refresh=False)
    assert_close(updates, expected, 1e-5)
    assert_close(new, after, 1e-5)


@pytest.mark.parametrize("recipe", [fs.shampoo, fs.muon], ids=lambda recipe: recipe.__name__)
def test_a_graph_for_a_second_model_of_other_sizes(recipe: Any) -> None:
    """From the second size on torch makes symbols of sizes; where blocks lie is made of numbers."""
    torch._dynamo.reset()
    for side in (8, 9, 11):
        tx, p = recipe(0.1), {"w": torch.eye(side, 8, dtype=torch.float64) + 0.1}
        compiled = torch.compile(tx.update, fullgraph=True, backend="eager")
        found, _ = compiled(p, tx.init(p), p, refresh=False)
        expected, _ = tx.update(p, tx.init(p), p, refresh=False)
        assert_close(found, expected, 1e-10)
    torch._dynamo.reset()
