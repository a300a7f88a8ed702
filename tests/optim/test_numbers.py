"""The wrapper computes what the functional loop does, which tests/test_torch_optim.py knows."""

from __future__ import annotations

import pytest
import torch

import funshampoo as fs
from tests.optim.runs import (
    METHODS,
    SHAMPOO,
    Method,
    assert_same,
    copies,
    functional,
    grads_of,
    moved,
    name_of,
    parameters,
    run,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_is_the_functional_loop_bit_by_bit(method: Method, dtype: torch.dtype) -> None:
    params, grads = parameters(dtype), grads_of(8, dtype)
    tx = method.transformation()
    expected, _ = functional([(tx, g) for g in grads], params)
    run(method.optimizer(params.items()), params, grads)
    assert_same(params, expected)


def test_parameters_without_names_are_numbered() -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = SHAMPOO.optimizer(params.values())
    numbered = {f"param_{i}": p for i, p in enumerate(params.values())}
    renamed = [{f"param_{i}": g[name] for i, name in enumerate(params)} for g in grads]
    tx = SHAMPOO.transformation()
    expected, _ = functional([(tx, g) for g in renamed], numbered)
    run(optimizer, params, grads)
    assert_same(numbered, expected)


def test_bfloat16_parameters_keep_float32_moments() -> None:
    """Measured elsewhere: in bfloat16 a decay of 0.999 rounds v back to itself: it sticks."""
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = fs.Optimizer([w], fs.adamw, lr=1e-3)
    for value in [1.0] + 50 * [0.01]:
        w.grad = torch.full_like(w, value)
        optimizer.step()
    second = optimizer.state[w]["scale_by_adam/second"]
    assert second.dtype == torch.float32
    v = 0.0
    rounded = torch.zeros((), dtype=torch.bfloat16)
    for value in [1.0] + 50 * [float(torch.tensor(0.01, dtype=torch.bfloat16))]:
        v = 0.999 * v + 0.001 * value**2
        rounded = (0.999 * rounded + 0.001 * value**2).to(torch.bfloat16)
    assert torch.allclose(second, torch.full((4,), v), rtol=1e-5)
    assert abs(float(rounded) - v) > 0.03 * v  # the fixture provokes the mistake


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_ascends_with_maximize(method: Method) -> None:
    params, opposite, grads = parameters(), parameters(), grads_of(6)
    before = copies(params)
    run(method.optimizer([{"params": list(params.items()), "maximize": True}]), params, grads)
    negated = [{name: -x for name, x in g.items()} for g in grads]
    run(method.optimizer(opposite.items()), opposite, negated)
    assert_same(params, opposite)
    assert moved(params, before) == params.keys()
