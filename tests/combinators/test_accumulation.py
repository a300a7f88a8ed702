"""multi_steps."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

import funshampoo as fs
from tests.trees import (
    assert_close,
    assert_equal,
    default_dtype,
    gradients,
    problem,
    tensors,
    train,
)


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


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("by_leaf", [False, True])
def test_what_a_guard_around_it_holds_is_left_out_too(where: int, by_leaf: bool) -> None:
    """The mean of the others is no gradient that is held: what averages it has to weigh it."""
    params, grads = problem(), gradients(6)
    for t in (where, 3 + where):
        bad = torch.full_like(grads[t]["w"], float("nan"))
        grads[t] = {**grads[t], "w": bad}
    plain = fs.multi_steps(fs.adamw(0.1), 3)
    around = fs.guarded(plain, by_leaf=by_leaf)
    alone, state = plain.init(params), around.init(params)
    for g in grads:
        _, alone = plain.update(g, alone, params)
        _, state = around.update(g, state, params)
        fs.state.check(state)
    assert int(state.inner.skipped) == 2
    assert_equal(state.inner.inner["scale_by_adam"], alone.inner["scale_by_adam"])


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


def test_it_stands_around_blocks_not_in_them() -> None:
    with pytest.raises(ValueError, match=r"multi_steps\(blocked\(\.\.\.\), every\)"):
        fs.blocked(fs.multi_steps(fs.trace(0.9), 2)).init(problem())


def test_none_on_every_micro_batch_is_none_and_on_some_a_zero() -> None:
    tx = fs.multi_steps(fs.chain(fs.add_decayed_weights(0.5), fs.scale(-1.0)), 2)
    params = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    one = torch.ones(2)
    state = tx.init(params)
    for _ in range(2):  # the second window remembers nothing of the first
        _, state = tx.update({"a": one, "b": one, "c": None}, state, params)
        updates, state = tx.update({"a": one, "b": None, "c": None}, state, params)
        assert torch.equal(updates["a"], -1.5 * one)
        assert torch.equal(updates["b"], -1.0 * one)
        assert updates["c"] is None


def test_a_frozen_parameter_stays_where_it_is_in_the_wrapper() -> None:
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    tx = fs.multi_steps(fs.shampoo(0.1, weight_decay=0.1, momentum=0.9), 2)
    optimizer = fs.Optimizer([p, q], tx)
    for t in range(8):
        p.requires_grad_(t < 4)
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        before = p.detach().clone(), q.detach().clone()
        optimizer.step()
        assert torch.equal(p, before[0]) is (t not in (1, 3))
        assert torch.equal(q, before[1]) is (t % 2 == 0)


def test_the_count_of_micro_batches_is_float32_whatever_the_default() -> None:
    with default_dtype(torch.bfloat16):
        state = fs.multi_steps(fs.sgd(0.1), 300).init({"w": torch.zeros(2, dtype=torch.float64)})
    assert state.used.dtype == torch.float32
