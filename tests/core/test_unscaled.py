"""The last factor of the updates, left to whoever adds them: `GradientTransformation.unscaled`."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

import funshampoo as fs
from funshampoo.blocks.executor import Executor
from funshampoo.blocks.regions import Parts
from funshampoo.core import applying
from funshampoo.core.context import Context
from tests.table import CASES, Case
from tests.trees import assert_close, assert_equal, gradients, problem, train

WITH_A_FACTOR = [case for case in CASES if case.make().unscaled is not None]
NAMES = {"adamw", "sgd", "guarded:by_leaf", "scale_by_learning_rate"}
BLOCKED = ("shampoo", "soap", "muon", "normuon", "spectral_descent", "kl_shampoo")
IN_BLOCKS = [case for case in CASES if case.name in BLOCKED]


def bad_gradients(steps: int) -> list[Any]:
    """The second has an entry that is not finite."""
    grads = gradients(steps)
    leaves, spec = optree.tree_flatten(grads[1])
    leaves[1].view(-1)[0] = torch.nan
    return [grads[0], optree.tree_unflatten(spec, leaves), *grads[2:]]


def test_who_has_a_factor() -> None:
    assert {case.name for case in IN_BLOCKS} == set(BLOCKED)
    assert {case.name for case in WITH_A_FACTOR} >= NAMES
    assert fs.sharded(fs.adamw(0.1), whole=False).unscaled is not None
    for tx in (fs.sharded(fs.adamw(0.1)), fs.blocked(fs.adamw(0.1)), fs.chain(), fs.scale(2.0)):
        assert tx.unscaled is None
    unaware = fs.GradientTransformation(**{**fs.adamw(0.1)._given, "minds_alive": False})
    assert fs.guarded(unaware).unscaled is None  # its state is put back


@pytest.mark.parametrize("case", WITH_A_FACTOR, ids=lambda case: case.name)
def test_the_factor_times_the_updates_are_the_updates(case: Case) -> None:
    tx, params = case.make(), problem()
    assert tx.unscaled is not None
    state, other = tx.init(params), tx.init(params)
    grads = bad_gradients(3) if case.public == "guarded" else gradients(3)
    for t, g in enumerate(grads, start=1):
        context = Context(step=t, clock=torch.tensor(t - 1))
        updates, state = tx.run(g, state, params, context)
        unscaled, factor, other = tx.unscaled(g, other, params, context)
        assert_equal(optree.tree_map(lambda u, by=factor: by * u, unscaled), updates)
        assert_equal(other, state)
        assert factor <= 0


def test_a_rate_that_is_a_tensor_is_multiplied_by_the_stage() -> None:
    rate = torch.tensor(0.1, requires_grad=True)  # one on a device likewise
    tx, params = fs.scale_by_learning_rate(rate), {"w": torch.ones(2)}
    assert tx.unscaled is not None
    updates, factor, _ = tx.unscaled(params, tx.init(params), None, Context())
    assert factor == 1
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", [*IN_BLOCKS, *WITH_A_FACTOR], ids=lambda case: case.name)
def test_what_a_device_does_in_one_pass_is_what_a_cpu_does_in_two(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the choice forced, since a CPU makes the other one."""
    grads, factors = gradients(3, dtype), []

    def on_a_device(self: Executor, *given: Any, real: Any = Executor.__init__) -> None:
        real(self, *given)
        self._on_cpu = False

    def scatter_add(self: Parts, *given: Any, real: Any = Parts.scatter_add) -> None:
        factors.append(given[4])
        real(self, *given)

    def add(params: Any, updates: Any, factor: float, real: Any = applying._add) -> None:
        factors.append(factor)
        real(params, updates, factor)

    expected, _, end = train(case.make(), problem(dtype=dtype), grads, fs.apply_updates)
    monkeypatch.setattr(Executor, "__init__", on_a_device)
    monkeypatch.setattr(Parts, "scatter_add", scatter_add)
    monkeypatch.setattr(applying, "_in_one_pass", lambda params: True)
    monkeypatch.setattr(applying, "_add", add)
    tx, params = case.make(), problem(dtype=dtype)
    state = tx.init(params)
    for g in grads:
        state = fs.update_in_place(tx, g, state, params)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-9
    assert_close(params, expected, rounding)
    assert_close(state, end, rounding)
    assert max(factors) <= 0
    assert min(factors) < 0
