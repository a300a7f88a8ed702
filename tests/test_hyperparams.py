"""inject_hyperparams."""

from __future__ import annotations

import pytest
import torch

import funshampoo as fs
from tests.trees import assert_close, gradients, problem, train


def test_numbers_go_to_the_state_in_float32_and_the_rest_stays() -> None:
    tx = fs.inject_hyperparams(fs.shampoo)(1e-2, weight_decay=0.1, every=3, max_size=4)
    hyperparams = tx.init(problem()).hyperparams
    assert {"learning_rate", "beta1", "beta2", "weight_decay", "grafting_epsilon"} <= set(
        hyperparams
    )
    assert not {"every", "max_size", "nesterov", "grafting", "solver"} & set(hyperparams)
    for value in hyperparams.values():
        assert value.dtype == torch.float32
        assert value.ndim == 0


def test_the_same_numbers_as_without() -> None:
    """momentum=0.0 as a tensor keeps its stage, which then passes everything through."""
    params, grads = problem(), gradients(5)
    options = {"every": 2, "max_size": 4, "weight_decay": 0.1}
    a, _, _ = train(fs.shampoo(0.1, **options), params, grads, fs.apply_updates)  # type: ignore[arg-type]
    tx = fs.inject_hyperparams(fs.shampoo)(0.1, **options)
    b, _, _ = train(tx, params, grads, fs.apply_updates)
    assert_close(a, b, 1e-6)


def test_a_hyperparameter_changed_between_steps_counts_from_the_next_step() -> None:
    tx = fs.inject_hyperparams(fs.sgd)(1.0, momentum=0.5)
    params, g = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    state = tx.init(params)
    _, state = tx.update(g, state, params)
    state = state._replace(
        hyperparams=state.hyperparams
        | {"learning_rate": torch.tensor(0.1), "momentum": torch.tensor(0.0)}
    )
    updates, _ = tx.update(g, state, params)
    assert updates["w"].item() == pytest.approx(-0.1)


def test_a_schedule_shows_its_value_and_uses_the_old_count() -> None:
    tx = fs.inject_hyperparams(fs.sgd)(
        fs.schedules.linear(1.0, 0.0, 4), weight_decay=fs.schedules.constant(0.0)
    )
    params, g = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    state = tx.init(params)
    steps = []
    for _ in range(3):
        updates, state = tx.update(g, state, params)
        steps.append((updates["w"].item(), state.hyperparams["learning_rate"].item()))
    assert steps == [(-1.0, 1.0), (-0.75, 0.75), (-0.5, 0.5)]


def test_any_number_can_be_scheduled() -> None:
    tx = fs.inject_hyperparams(fs.shampoo)(0.1, beta2=fs.schedules.linear(0.5, 0.9, 4))
    params = problem()
    state = tx.init(params)
    for g in gradients(3):
        _, state = tx.update(g, state, params)
    assert state.hyperparams["beta2"].item() == pytest.approx(0.7)


def test_static_args_stay_numbers() -> None:
    make = fs.inject_hyperparams(fs.shampoo, static_args=("beta2", "momentum"))
    state = make(0.1, beta2=1.0).init(problem())
    assert "beta2" not in state.hyperparams
    assert "trace" not in state.inner["blocked"].inner
    with pytest.raises(TypeError, match="static_args names \\['beta_2'\\]"):
        fs.inject_hyperparams(fs.shampoo, static_args=("beta_2",))


def test_a_tensor_keeps_its_dtype() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    state = fs.inject_hyperparams(fs.sgd)(rate).init(problem())
    assert state.hyperparams["learning_rate"] is rate


def test_an_argument_that_the_factory_does_not_have() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        fs.inject_hyperparams(fs.sgd)(learning_rat=0.1)
