"""inject_hyperparams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from funshampoo import linalg
from funshampoo.core.contract import renamed
from tests.releases import wrong_before
from tests.trees import assert_close, gradients, problem, tensors, train


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


def test_under_another_name_the_callers_numbers_are_the_same() -> None:
    """Those of the state are not the caller's to give, and what may read any still may."""
    own = fs.inject_hyperparams(fs.adamw)(0.1)
    any_number = fs.wrapping(fs.scale(1.0), lambda updates, run, own, *, hyper: (run(updates), own))
    for tx in (own, any_number, fs.in_tf32(fs.scale(1.0))):
        found = renamed(tx, "another")
        assert (found.live, found.traits) == (tx.live, tx.traits)
    params, found = {"w": torch.ones(2)}, renamed(own, "another")
    with pytest.raises(ValueError, match="no stage here reads a live number 'beta1'"):
        found.update(params, found.init(params), params, hyper={"beta1": 0.5})


def test_the_same_numbers_as_without() -> None:
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


RECIPES = [
    (fs.sgd, {"momentum": 0.9, "nesterov": True}),
    (fs.sgd, {"momentum": 0.9, "dampening": 0.5}),
    (fs.adamw, {"weight_decay": 0.1}),
    (fs.from_reference, {"betas": (0.9, 0.99), "epsilon": 1e-4}),
    *[(fs.shampoo, {"grafting": g}) for g in ("adam", "rms", "adagrad", "sgd", None)],
    (fs.shampoo, {"beta2": 1.0}),
    (fs.shampoo, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (fs.shampoo, {"solver": linalg.pseudo_inverse(rtol=1e-4)}),
    (fs.shampoo, {"solver": linalg.newton_schulz()}),
]


@pytest.mark.parametrize(("recipe", "options"), RECIPES, ids=range(len(RECIPES)))
def test_injected_equals_plain(recipe: Any, options: dict[str, Any]) -> None:
    params, grads = problem(), gradients(4)
    if recipe is fs.shampoo:  # hyperparameters are rounded to float32: not for bad conditions
        options = {"relative_epsilon": 1e-2, **options}
    plain, history, _ = train(recipe(**options, **rate(recipe)), params, grads, fs.apply_updates)
    tx = fs.inject_hyperparams(recipe)(**options, **rate(recipe))
    injected, _, _ = train(tx, params, grads, fs.apply_updates)
    assert_close(injected, plain, 1e-4)
    assert max(float(u.abs().max()) for u in tensors(history)) > 1e-3


def rate(recipe: Any) -> dict[str, float]:
    return {"lr" if recipe is fs.from_reference else "learning_rate": 0.1}


def test_defaults_that_switch_a_part_off_stay_numbers() -> None:
    """momentum=0.0 and epsilon=0.0 by default: no stage, and no tensor in the state."""
    state = fs.inject_hyperparams(fs.shampoo)(0.1).init(problem())
    assert not {"momentum", "epsilon", "weight_decay"} & set(state.hyperparams)
    assert "trace" not in state.inner["blocked"].inner.inner
    state = fs.inject_hyperparams(fs.shampoo)(0.1, weight_decay=0.0).init(problem())
    assert state.hyperparams["weight_decay"] == 0
    assert "add_decayed_weights" in state.inner["blocked"].inner.inner


def test_edits_of_unknown_names_are_errors_and_numbers_are_taken() -> None:
    tx = fs.inject_hyperparams(fs.sgd)(1)
    params = {"w": torch.ones(1)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"has \['learning_rate', 'lr'\]; this transformation"):
        tx.update(params, state._replace(hyperparams=state.hyperparams | {"lr": 0.1}), params)
    edited = state._replace(hyperparams={"learning_rate": 0.25})
    updates, new = tx.update(params, edited, params)
    assert updates["w"].item() == -0.25
    assert isinstance(new.hyperparams["learning_rate"], torch.Tensor)


def test_a_batch_of_hyperparameters_in_the_state() -> None:
    tx = fs.inject_hyperparams(fs.shampoo)(0.1, beta2=0.9)
    params, grads = problem(), gradients(3)
    rates = torch.tensor([0.01, 0.1])

    def run(learning_rate: torch.Tensor) -> Any:
        state, now = tx.init(params), params
        state = state._replace(hyperparams=state.hyperparams | {"learning_rate": learning_rate})
        for g in grads:
            updates, state = tx.update(g, state, now)
            now = fs.apply_updates(now, updates)
        return now

    together = vmap(run)(rates)
    for i, learning_rate in enumerate(rates):
        assert_close([x[i] for x in tensors(together)], tensors(run(learning_rate)), 1e-9)


def test_static_args_stay_numbers() -> None:
    make = fs.inject_hyperparams(fs.shampoo, static_args=("beta2",))
    assert "beta2" not in make(0.1, beta2=0.5).init(problem()).hyperparams
    with pytest.raises(TypeError, match="static_args names \\['beta_2'\\]"):
        fs.inject_hyperparams(fs.shampoo, static_args=("beta_2",))


@pytest.mark.parametrize("value", [None, "0.1", True, torch.ones(2), [0.1]], ids=repr)
@pytest.mark.parametrize("live", [True, False])
def test_an_edit_that_is_no_number_is_refused_by_name(live: bool, value: Any) -> None:
    """They reached torch, or the arithmetic of a stage, which broadcast some."""
    make: Any = fs.sgd if live else lambda learning_rate: fs.sgd(learning_rate)
    tx = fs.inject_hyperparams(make)(0.1)
    params, state = problem(), tx.init(problem())
    edited = state._replace(hyperparams=state.hyperparams | {"learning_rate": value})
    with pytest.raises(TypeError, match=r"\['learning_rate'\] is .* torch.tensor\(0.1\)"):
        tx.update(params, edited, params)
    number = state._replace(hyperparams=state.hyperparams | {"learning_rate": np.float32(1)})
    tx.update(params, number, params)


def test_the_names_of_other_hyperparams_are_explained() -> None:
    """A default of 1 is not in the state, which nothing but the docstring told."""
    tx = fs.inject_hyperparams(lambda rate, factor=1.0: fs.scale(rate * factor))(0.1)
    state = tx.init(problem())
    edited = state._replace(hyperparams=state.hyperparams | {"factor": torch.tensor(2.0)})
    with pytest.raises(ValueError, match="its default is a float other than 0, 1 and -1"):
        tx.update(problem(), edited)


def test_a_tensor_keeps_its_dtype() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    state = fs.inject_hyperparams(fs.sgd)(rate).init(problem())
    assert state.hyperparams["learning_rate"] is rate


def test_an_argument_that_the_factory_does_not_have() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        fs.inject_hyperparams(fs.sgd)(learning_rat=0.1)


@pytest.mark.slow
def test_a_recipe_of_ones_own_can_be_compiled_whole() -> None:
    """It is built anew inside the graph, where torch.compile can't trace `inspect`."""
    wrong_before("2.13", "a transformation can't be built inside a graph")

    def recipe(rate: float, decay: float = 0.5) -> fs.GradientTransformation:
        direction = fs.chain(fs.kronecker_statistics(decay), fs.ema(decay))
        return fs.blocked(fs.guarded(fs.chain(direction, fs.scale_by_learning_rate(rate))))

    tx, params, grads = fs.inject_hyperparams(recipe)(0.1), problem(), gradients(2)
    step = torch.compile(tx.update, fullgraph=True, backend="eager")
    state = mine = tx.init(params)
    for g in grads:
        updates, state = step(g, state, params)
        expected, mine = tx.update(g, mine, params)
        assert_close(updates, expected, 1e-6)
    torch.compiler.reset()
