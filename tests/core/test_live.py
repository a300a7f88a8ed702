"""Live numbers: an edit is what the next step uses, and nothing is built anew for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.core.checks import check_range
from funshampoo.core.live import Live, is_exactly, mapped, number, resolved
from funshampoo.optim.vocabulary import Vocabulary
from tests.trees import assert_close, assert_equal, gradients, problem

EDITS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "shampoo": (
        fs.shampoo,
        {"momentum": 0.9, "weight_decay": 0.1, "epsilon": 1e-3, "every": 2, "dampening": 0.1},
        {
            "lr": 0.02,
            "betas": (0.8, 0.95),
            "epsilon": 1e-2,
            "momentum": 0.7,
            "weight_decay": 0.3,
            "grafting_epsilon": 1e-4,
            "relative_epsilon": 1e-2,
            "dampening": 0.2,
        },
    ),
    "adamw": (
        fs.adamw,
        {},
        {"lr": 0.02, "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.3},
    ),
    "sgd": (fs.sgd, {"momentum": 0.9}, {"lr": 0.02, "momentum": 0.5}),
    "from_reference": (
        fs.from_reference,
        {"betas": (0.9, 0.99), "epsilon": 1e-4, "weight_decay": 0.1},
        {"lr": 0.02, "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.3},
    ),
}


def functional_arguments(recipe: Any, group: dict[str, Any]) -> dict[str, Any]:
    """As the recipe itself calls them."""
    given = dict(group)
    if recipe is fs.from_reference:
        return given
    if "lr" in given:
        given["learning_rate"] = given.pop("lr")
    if "betas" in given:
        given["beta1"], given["beta2"] = given.pop("betas")
    if recipe is fs.sgd:
        return {name: x for name, x in given.items() if name not in ("beta1", "beta2")}
    return given


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_what_the_next_step_uses_and_builds_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options, edit = EDITS[name]
    params = [(n, torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))) for n in "ab"]
    twins = {n: p.detach().clone() for n, p in params}
    optimizer = fs.Optimizer(params, recipe, lr=0.1, **options)
    built: list[Any] = []
    original = Vocabulary.build
    monkeypatch.setattr(Vocabulary, "build", lambda self, *a: built.append(a) or original(self, *a))
    before = functional_arguments(recipe, {"lr": 0.1, **options})
    after = before | functional_arguments(recipe, edit)
    if recipe is fs.from_reference:
        after["peak_lr"] = 0.1
    state = None
    for t in range(6):
        grads = {n: torch.randn(4, 3, dtype=torch.float64) for n in twins}
        for n, p in params:
            p.grad = grads[n]
        if t == 3:
            optimizer.param_groups[0].update(edit)
        optimizer.step()
        tx = recipe(**(before if t < 3 else after))
        state = tx.init(twins) if state is None else state
        updates, state = tx.update(grads, state, twins)
        twins = fs.apply_updates(twins, updates)
        for n, p in params:
            assert torch.equal(p.detach(), twins[n]), (n, t)
    assert not built


def test_a_number_that_switches_a_part_builds_another_chain() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = fs.Shampoo([p], lr=0.1)
    for momentum in (0.0, 0.9, 0.5, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.randn(3, 2)
        optimizer.step()
        assert any("trace" in entry for entry in optimizer.state[p]) == (momentum != 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("betas", (1.5, 0.9)),
        ("betas", (0.9, 0.0)),
        ("momentum", -0.5),
        ("epsilon", -1e-3),
        ("relative_epsilon", -1e-3),
    ],
)
def test_an_edit_out_of_range_is_an_error_before_anything_moves(name: str, value: Any) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    options = {"momentum": 0.9, "weight_decay": 0.1, "epsilon": 1e-3}
    optimizer = fs.Shampoo([{"params": [q]}, {"params": [p]}], lr=0.1, **options)
    p.grad = q.grad = torch.ones(3, 2)
    optimizer.step()
    before = [x.detach().clone() for x in (p, q)]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match="must (lie|be)"):
        optimizer.step()
    assert_equal([p.detach(), q.detach()], before)


@pytest.mark.parametrize("grafting", ["adam", "rms", "adagrad"])
def test_a_plain_sum_of_statistics_may_be_asked_for(grafting: Any) -> None:
    """The grafted method then takes another number than the one that is given."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    for betas in ((0.9, 0.9), (0.9, 1.0)):
        optimizer = fs.Shampoo([p], lr=0.1, betas=betas, grafting=grafting)
        p.grad = torch.randn(3, 2)
        optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 1.0)
        optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 1.5)
        with pytest.raises(ValueError, match="beta2 is 1.5"):
            optimizer.step()


def test_what_is_noted_of_a_function_checks_its_values() -> None:
    beta = Live("beta", 0.5)
    twice = mapped(mapped(beta, lambda x: 2 * x), lambda x: x - 0.5)
    check_range("twice", twice, 0.0, 1.0)
    assert number(twice, {"beta": 0.4}) == pytest.approx(0.3)
    (check,) = beta.checks
    check(0.7)
    with pytest.raises(ValueError, match="twice is 1.1"):
        check(0.8)


def test_given_to_a_chain_of_ones_own() -> None:
    tx = fs.chain(fs.trace(Live("mu", 0.9)), fs.scale_by_learning_rate(Live("rate", 0.1)))
    params = problem()
    plain = fs.chain(fs.trace(0.5), fs.scale_by_learning_rate(0.2))
    state, expected = tx.init(params), plain.init(params)
    for g in gradients(3):
        updates, state = tx.update(g, state, params, hyper={"mu": 0.5, "rate": 0.2})
        wanted, expected = plain.update(g, expected, params)
        assert_equal(updates, wanted)


def test_injected_numbers_are_looked_up_and_differentiable() -> None:
    tx, params, g = fs.inject_hyperparams(fs.sgd)(0.1, momentum=0.9), problem(), gradients(1)[0]
    state = tx.init(params)

    def moved(rate: Tensor) -> Tensor:
        edited = state._replace(hyperparams=state.hyperparams | {"learning_rate": rate})
        return tx.update(g, edited, params)[0]["w"].sum()

    slope = torch.func.grad(moved)(torch.tensor(0.1))
    assert_close(slope, -g["w"].sum().to(slope.dtype), 1e-6)


def test_numbers_of_a_solver() -> None:
    solver = fs.linalg.eigh(relative_epsilon=Live("damping", 1e-6))
    now = resolved(solver, {"damping": 1e-2})
    assert now == fs.linalg.eigh(relative_epsilon=1e-2)
    assert is_exactly(Live("x", 1), 1.0)
    assert number(Live("x", 1), {}) == 1
