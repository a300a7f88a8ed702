"""multi_steps."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

import funshampoo as fs
from tests.trees import assert_close, assert_equal, gradients, problem, tensors, train


def mean(trees: list[Any]) -> Any:
    return optree.tree_map(lambda *xs: sum(xs) / len(xs), *trees)


def test_equals_the_inner_transformation_on_averages() -> None:
    params, grads = problem(), gradients(12)
    inner = fs.shampoo(0.1, every=2, max_size=4)
    averages = [mean(grads[i : i + 3]) for i in range(0, 12, 3)]
    expected, _, _ = train(inner, params, averages, fs.apply_updates)
    got, history, state = train(fs.multi_steps(inner, 3), params, grads, fs.apply_updates)
    assert_close(got, expected, 1e-12)
    for t, updates in enumerate(history, start=1):
        moved = any(float(u.abs().max()) > 0 for u in tensors(updates))
        assert moved == (t % 3 == 0)
    assert int(state.skipped) == 0


def test_runs_the_inner_transformation_on_real_steps_only() -> None:
    calls = []

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        calls.append(context.get("step"))
        return updates, state

    tx = fs.multi_steps(fs.GradientTransformation(lambda p: fs.EmptyState(), update), 4)
    params = {"w": torch.ones(1)}
    state = tx.init(params)
    for t in range(1, 13):
        _, state = tx.update(params, state, params, step=t)
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_non_finite_micro_batch_does_not_poison(bad: float, where: int) -> None:
    """It is left out of the average and counted; the others count in full."""
    params, grads = problem(), gradients(3)
    poisoned = list(grads)
    poisoned[where] = optree.tree_map(lambda x: x.clone(), grads[where])
    poisoned[where]["layers"][1]["scale"].fill_(bad)
    good = [g for i, g in enumerate(grads) if i != where]
    inner = fs.shampoo(0.1)
    expected, _, _ = train(inner, params, [mean(good)], fs.apply_updates)
    got, _, state = train(fs.multi_steps(inner, 3), params, poisoned, fs.apply_updates)
    assert_close(got, expected, 1e-12)
    assert int(state.skipped) == 1


def test_a_step_without_one_finite_micro_batch_changes_nothing() -> None:
    params, grads = problem(), gradients(4)
    nan = optree.tree_map(lambda x: x * float("nan"), grads[0])
    tx = fs.multi_steps(fs.shampoo(0.1, every=1, momentum=0.9), 2)
    now, _, state = train(tx, params, grads[:2], fs.apply_updates)
    poisoned = state
    for _ in range(2):
        updates, poisoned = tx.update(nan, poisoned, now)
        assert all(float(u.abs().max()) == 0 for u in tensors(updates))
    assert int(poisoned.skipped) == 2
    for a, b in zip(tensors(poisoned.inner), tensors(state.inner)):
        if a.is_floating_point():
            assert torch.equal(a, b)
    # and training goes on as if nothing had been
    for g in grads[2:]:
        after_poison, poisoned = tx.update(g, poisoned, now)
        expected, state = tx.update(g, state, now)
    assert_equal(after_poison, expected)


def test_a_micro_gradient_of_none_counts_as_zeros() -> None:
    tx = fs.multi_steps(fs.scale(1.0), 2)
    params = {"expert": torch.zeros(1), "other": torch.zeros(1)}
    state = tx.init(params)
    _, state = tx.update({"expert": torch.tensor([4.0]), "other": torch.ones(1)}, state, params)
    updates, _ = tx.update({"expert": None, "other": torch.ones(1)}, state, params)
    assert updates["expert"].item() == 2.0


def test_half_precision_is_summed_in_float32() -> None:
    tx = fs.multi_steps(fs.scale(1.0), 256)
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    g = {"w": torch.full((1,), 1.0078125, dtype=torch.bfloat16)}
    state = tx.init(params)
    for _ in range(256):
        updates, state = tx.update(g, state, params)
    assert updates["w"].item() == 1.0078125


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every is 0"):
        fs.multi_steps(fs.sgd(0.1), 0)


def test_inside_a_scope_statistics_are_of_the_average_too() -> None:
    params, grads = problem(), gradients(4)
    grads[2] = optree.tree_map(lambda x: x * float("nan"), grads[2])
    inner = fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(1), fs.scale(-0.1))
    a, _, _ = train(fs.blocked(fs.multi_steps(inner, 2), 4), params, grads, fs.apply_updates)
    b, _, _ = train(fs.multi_steps(fs.blocked(inner, 4), 2), params, grads, fs.apply_updates)
    assert_close(a, b, 1e-9)
