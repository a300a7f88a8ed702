"""torch.func over the optimizer: ensembles, hyperparameters, gradients through training."""

from __future__ import annotations

import copy
from typing import Any

import optree
import pytest
import torch
from torch.func import grad, grad_and_value, vmap

import funshampoo as fs
from funshampoo import linalg
from tests.trees import assert_close, assert_unchanged, clone, gradients, problem, snapshot, train

D = torch.float64


def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(x @ params["w1"] + params["b1"])
    return ((hidden @ params["w2"] - y) ** 2).mean()


def model(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return {
        "w1": torch.randn(5, 7, generator=g, dtype=D),
        "b1": torch.randn(7, generator=g, dtype=D),
        "w2": torch.randn(7, 2, generator=g, dtype=D),
    }


X = torch.randn(16, 5, generator=torch.Generator().manual_seed(9), dtype=D)
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(10), dtype=D)


def optimizer(rate: Any) -> fs.GradientTransformation:
    return fs.shampoo(
        rate, every=3, max_size=4, momentum=0.9, nesterov=True, weight_decay=0.01, epsilon=1e-6
    )


def train_one(rate: Any, params: Any, steps: int, **context: Any) -> tuple[Any, torch.Tensor]:
    tx = optimizer(rate)
    state = tx.init(params)
    for _ in range(steps):
        grads, value = grad_and_value(loss)(params, X, Y)
        updates, state = tx.update(grads, state, params, **context)
        params = fs.apply_updates(params, updates)
    return params, value


def test_an_ensemble_with_a_rate_a_member_equals_a_loop() -> None:
    """The training loop itself under vmap, refreshes included, without step=."""
    members = [model(seed) for seed in range(4)]
    rates = torch.tensor([0.01, 0.03, 0.1, 0.3], dtype=D)
    stacked = {k: torch.stack([m[k] for m in members]) for k in members[0]}
    params, values = vmap(lambda r, p: train_one(r, p, 8))(rates, stacked)
    for i, member in enumerate(members):
        expected, value = train_one(rates[i], member, 8)
        assert_close({k: v[i] for k, v in params.items()}, expected, 1e-10)
        assert abs(values[i] - value) < 1e-10
    assert len({round(v.item(), 6) for v in values}) == 4  # the rates made a difference


def test_an_ensemble_step_by_step_with_step_in_the_context() -> None:
    members = [model(seed) for seed in range(3)]
    tx = optimizer(0.1)
    params = {k: torch.stack([m[k] for m in members]) for k in members[0]}
    state = vmap(tx.init)(params)

    def one(params: Any, state: Any, step: int) -> Any:
        updates, state = tx.update(grad(loss)(params, X, Y), state, params, step=step)
        return fs.apply_updates(params, updates), state

    for t in range(1, 8):
        params, state = vmap(lambda p, s, t=t: one(p, s, t))(params, state)
    for i, member in enumerate(members):
        expected, _ = train_one(0.1, member, 7)
        assert_close({k: v[i] for k, v in params.items()}, expected, 1e-10)


def test_members_at_different_steps_are_an_error_that_says_what_to_do() -> None:
    tx, params = optimizer(0.1), model(0)
    stacked = {k: torch.stack([v, v]) for k, v in params.items()}
    state = vmap(tx.init)(stacked)
    state["clock"] = fs.state.ClockState(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="different steps.*refresh"):
        vmap(tx.update)(stacked, state, stacked)


def test_vmap_over_hyperparameters_with_one_model() -> None:
    params, grads = problem(), gradients(4)
    betas = torch.tensor([0.5, 0.9, 0.99], dtype=D)

    def run(beta2: torch.Tensor) -> Any:
        tx = fs.shampoo(0.1, beta2=beta2, grafting_beta2=beta2, every=2, relative_epsilon=1e-3)
        return train(tx, params, grads, fs.apply_updates)[0]

    batched = vmap(run)(betas)
    for i, beta2 in enumerate(betas):
        expected = run(beta2)
        assert_close([x[i] for x in tensors_of(batched)], tensors_of(expected), 1e-10)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return list(torch.utils._pytree.tree_leaves(tree))


@pytest.mark.parametrize("name", ["beta1", "beta2", "relative_epsilon", "momentum"])
def test_a_batched_hyperparameter_with_a_donated_state(name: str) -> None:
    """Nothing can be written into a state that the members share: then donation is ignored."""
    params, grads = problem(), gradients(3)

    def run(value: torch.Tensor, donate: bool) -> Any:
        tx = fs.shampoo(0.1, **{"relative_epsilon": 1e-2, name: value})
        return train(tx, params, grads, fs.apply_updates, donate=donate)[0]

    values = torch.tensor([0.5, 0.9], dtype=D)
    donated = vmap(lambda value: run(value, donate=True))(values)
    for i, value in enumerate(values):
        expected = run(value, donate=False)
        assert_close([x[i] for x in tensors_of(donated)], tensors_of(expected), 1e-9)


@pytest.mark.parametrize("own", ["gradient", "state"])
@pytest.mark.parametrize("make", [fs.adamw, fs.shampoo])
def test_members_can_not_write_to_a_parameter_that_they_share(make: Any, own: str) -> None:
    tx, params = make(0.1), {"w": torch.ones(3, 2)}
    grads = {"w": torch.randn(4, 3, 2)}
    state = vmap(lambda g: tx.init({"w": 0 * g["w"]}))(grads)
    before = snapshot(state)

    def step(g: Any, s: Any) -> Any:
        g = g if own == "gradient" else {"w": torch.ones(3, 2)}
        return fs.update_in_place(tx, g, s, params)

    with pytest.raises(ValueError, match="'w' is one tensor for all members of vmap"):
        vmap(step)(grads, state)
    assert_unchanged(before, state)
    assert params["w"].equal(torch.ones(3, 2))
    members = {"w": torch.stack([params["w"]] * 4)}
    vmap(lambda g, s, p: fs.update_in_place(tx, g, s, p))(grads, state, members)
    for w, g in zip(members["w"], grads["w"]):
        alone = {"w": params["w"].clone()}
        fs.update_in_place(tx, {"w": g}, tx.init(alone), alone)
        torch.testing.assert_close(w, alone["w"])


def test_per_example_preconditioning_inside_vmap_of_grad() -> None:
    """vmap(grad) inside, the chain outside: the gradients of examples, averaged by hand."""
    params = model(0)
    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(params, X, Y)
    mean = {k: g.mean(0) for k, g in per_example.items()}
    whole = grad(loss)(params, X, Y)
    tx = optimizer(0.1)
    a, _ = tx.update(mean, tx.init(params), params)
    b, _ = tx.update(whole, tx.init(params), params)
    assert_close(a, b, 1e-10)


Hyperparams = dict[str, torch.Tensor]
SOLVERS = {
    "eigh": lambda h: linalg.eigh(),
    "eigh_relative": lambda h: linalg.eigh(relative_epsilon=h["epsilon"]),
    "newton_schulz": lambda h: linalg.newton_schulz(relative_epsilon=h["epsilon"], tolerance=1e-13),
}


def objective(
    h: Hyperparams, kind: str, solver: str, trace_scaling: float | None = None
) -> torch.Tensor:
    """The loss after three Shampoo steps, as a function of the hyperparameters.

    kind "trained" is ordinary; in "tied" all eigenvalues of the statistics are equal (a gradient
    that is a multiple of an orthogonal matrix); in "zero" the first gradients are zero.
    """
    params = model(0)
    if kind == "tied":
        params = {"w1": torch.eye(5, 7, dtype=D), "b1": torch.zeros(7, dtype=D), "w2": params["w2"]}
    tx = fs.shampoo(
        h["learning_rate"],
        beta1=0.9,
        beta2=h["beta2"],
        epsilon=h["epsilon"],
        every=1,
        max_size=8,
        solver=SOLVERS[solver](h),
        trace_scaling=trace_scaling,
    )
    state = tx.init(params)
    for t in range(3):
        grads = grad(loss)(params, X, Y)
        if kind == "zero" and t < 2:
            grads = {k: torch.zeros_like(g) for k, g in grads.items()}
        if kind == "tied":
            grads["w1"] = torch.eye(5, 7, dtype=D) * (t + 1) + 0 * grads["w1"]
            grads["b1"] = torch.zeros(7, dtype=D)
        updates, state = tx.update(grads, state, params)
        params = fs.apply_updates(params, updates)
    return loss(params, X, Y)


@pytest.mark.parametrize("kind", ["trained", "tied", "zero"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_gradients_through_three_steps_equal_finite_differences(kind: str, solver: str) -> None:
    h = {
        "learning_rate": torch.tensor(0.1, dtype=D),
        "beta2": torch.tensor(0.9, dtype=D),
        "epsilon": torch.tensor(1e-2, dtype=D),
    }
    found = grad(lambda h: objective(h, kind, solver))(h)
    for name, value in h.items():
        e = 1e-5 * value
        above = objective({**h, name: value + e}, kind, solver)
        below = objective({**h, name: value - e}, kind, solver)
        expected = ((above - below) / (2 * e)).item()
        assert torch.isfinite(found[name])
        assert found[name].item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    assert found["learning_rate"].abs() > 1e-3  # not trivially zero


def test_trace_scaling_of_zero_statistics_has_a_derivative() -> None:
    h = {
        "learning_rate": torch.tensor(0.1, dtype=D),
        "beta2": torch.tensor(0.9, dtype=D),
        "epsilon": torch.tensor(1e-2, dtype=D),
    }

    def f(beta2: torch.Tensor) -> torch.Tensor:
        args = {**h, "beta2": beta2, "epsilon": torch.tensor(0.0, dtype=D)}
        solvers = SOLVERS["eigh_relative"](h)
        SOLVERS["fixed"] = lambda _: solvers
        return objective(args, "zero", "fixed", trace_scaling=0.5)

    e = 1e-6
    expected = (f(h["beta2"] + e) - f(h["beta2"] - e)) / (2 * e)
    assert grad(f)(h["beta2"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_vmap_of_grad_over_learning_rates() -> None:
    params = model(0)

    def through(rate: torch.Tensor) -> torch.Tensor:
        return train_one(rate, params, 3)[1]

    rates = torch.tensor([0.01, 0.1], dtype=D)
    together = vmap(grad(through))(rates)
    assert_close(list(together), [grad(through)(rate) for rate in rates], 1e-9)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_plain_autograd_through_the_optimizer(donate: bool) -> None:
    """What autograd records is not written to, as under torch.func: backward needs it."""
    rate = torch.tensor(0.1, dtype=D, requires_grad=True)
    train_one(rate, model(0), 3, donate=donate)[1].backward()
    expected = grad(lambda r: train_one(r, model(0), 3)[1])(rate.detach())
    assert rate.grad is not None
    assert torch.allclose(rate.grad, expected, rtol=1e-12)


def test_inference_mode_and_no_grad_give_the_same() -> None:
    params, grads = problem(), gradients(3)
    a = train(optimizer(0.1), params, grads, fs.apply_updates)[0]
    with torch.no_grad():
        b = train(optimizer(0.1), params, grads, fs.apply_updates)[0]
    with torch.inference_mode():
        c = train(optimizer(0.1), params, grads, fs.apply_updates)[0]
    assert_close(a, b, 0.0)
    assert_close(a, clone(c), 0.0)


def test_functional_call_with_a_module() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    params = {k: v.detach() for k, v in module.named_parameters()}
    x, y = X.float(), Y.float()

    def objective(params: Any) -> torch.Tensor:
        return ((torch.func.functional_call(module, params, (x,)) - y) ** 2).mean()

    before = snapshot(dict(module.named_parameters()))
    tx = fs.shampoo(0.05)
    state, first = tx.init(params), objective(params)
    for _ in range(20):
        updates, state = tx.update(grad(objective)(params), state, params)
        params = fs.apply_updates(params, updates)
    assert objective(params) < 0.5 * first
    assert_unchanged(before, dict(module.named_parameters()))


STAGES: dict[str, Any] = {
    "schedule_free": lambda: fs.schedule_free(0.01),
    "primal_average": lambda: fs.primal_average(0.01, average=0.9, interpolation=0.9),
    "ema_nesterov": lambda: fs.chain(fs.sgd(0.01), fs.ema_nesterov(0.5)),
    "tail_average": lambda: fs.chain(fs.sgd(0.01), fs.tail_average()),
    "decay": lambda: fs.chain(fs.add_decayed_weights(0.1), fs.trace(0.9)),
    "blocked": lambda: fs.blocked(fs.schedule_free(0.01), max_size=2, with_params=True),
    "splus": lambda: fs.splus(0.01),
}


@pytest.mark.parametrize("name", STAGES)
def test_steps_of_a_module_outside_of_no_grad_keep_no_graph(name: str) -> None:
    """Each step's would hang on the one before: memory grew with every step."""
    tx, w = STAGES[name](), torch.nn.Parameter(torch.ones(3, 2))
    state = tx.init({"w": w})
    for _ in range(2):
        updates, state = tx.update({"w": torch.ones(3, 2)}, state, {"w": w})
    assert not [x for x in optree.tree_leaves((updates, state)) if x.requires_grad]
    assert not [x for x in optree.tree_leaves(tx.init({"w": w})) if x.requires_grad]
    followed = torch.ones(3, 2, requires_grad=True)  # as create_graph=True makes a gradient
    updates, state = tx.update({"w": followed}, state, {"w": w})
    assert updates["w"].requires_grad


@pytest.mark.parametrize("name", [name for name in STAGES if name != "decay"])
def test_a_recorded_state_is_not_stepped_in_place(name: str) -> None:
    """With detached parameters, as the error for recorded ones advises, every step was recorded."""
    tx, w = STAGES[name](), torch.ones(3, 2, requires_grad=True)
    grads, params = {"w": torch.ones(3, 2)}, {"w": w.detach()}
    with pytest.raises(ValueError, match=r"the state requires gradients.*init with p\.detach"):
        fs.update_in_place(tx, grads, tx.init({"w": w}), params)
    assert (w == 1).all()
    state = fs.update_in_place(tx, grads, tx.init(params), params)
    assert not [x for x in optree.tree_leaves(state) if x.requires_grad]


@pytest.mark.parametrize("name", [name for name in STAGES if name != "decay"])
def test_a_checkpoint_of_a_recorded_state_can_be_copied(name: str) -> None:
    """A state of plain tensors that require gradients is part of a graph; what is saved is not."""
    tx, w = STAGES[name](), torch.ones(3, 2, requires_grad=True)
    state = tx.init({"w": w})
    assert [x for x in optree.tree_leaves(state) if x.requires_grad]
    saved = copy.deepcopy(fs.state.state_dict(state))
    found = fs.state.load_state_dict(tx.init({"w": w.detach()}), saved).state
    torch.testing.assert_close(optree.tree_leaves(found), optree.tree_leaves(state))
