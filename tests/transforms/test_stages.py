"""Stages one by one, by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg
from funshampoo.core.live import Live
from funshampoo.linalg import InverseRoot
from funshampoo.operators.exponents import side_exponents
from funshampoo.operators.mode_products import precondition, unfold
from funshampoo.state import Kept, KroneckerState, find_state
from tests.trees import gradients, problem, tensors

D = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def run(tx: fs.GradientTransformation, grads: list[Any], **context: Any) -> tuple[list[Any], Any]:
    state, history = tx.init(grads[0]), []
    for g in grads:
        u, state = tx.update(g, state, g, **context)
        history.append(u)
    return history, state


@pytest.mark.parametrize("block_ndim", [0, 1])
def test_statistics_are_contractions_over_all_other_axes(block_ndim: int) -> None:
    g = randn(5, 4, 3, 2)
    tx = fs.kronecker_statistics(0.9)
    state = tx.init({"g": g}, block_ndim=block_ndim)
    for _ in range(2):
        _, state = tx.update({"g": g}, state, block_ndim=block_ndim)
    letters = "nabc" if block_ndim else "nabc"[:4]
    weight = 1 - 0.9**2
    sides = letters[block_ndim:]
    for side, factor in zip(sides, state.factors["g"]):
        lead = letters[:block_ndim]
        expected = torch.einsum(f"{letters},{letters.replace(side, 'z')}->{lead}{side}z", g, g)
        assert torch.allclose(factor, weight * expected, rtol=1e-12)
    assert state.weight["g"].shape == g.shape[:block_ndim]
    assert torch.allclose(state.weight["g"], torch.tensor(weight, dtype=D))


def test_unfolding_has_the_side_first() -> None:
    x = randn(2, 3, 4, 5)
    assert unfold(x, 1, 1).shape == (2, 4, 15)
    assert torch.equal(unfold(x, 2)[1], x[:, :, 1].reshape(-1))


@pytest.mark.parametrize("block_ndim", [0, 1])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_precondition_is_a_mode_product_for_every_side(order: int, block_ndim: int) -> None:
    sides = (3, 4, 2, 5)[:order]
    x = randn(*(6,) * block_ndim, *sides)
    roots: list[torch.Tensor | None] = []
    for i, d in enumerate(sides):
        a = randn(*(6,) * block_ndim, d, d, seed=i)
        roots.append(a + a.mT)
    if order > 2:
        roots[1] = None
    expected = x.clone()
    for i, root in enumerate(roots):
        if root is not None:
            n = "n" * block_ndim
            axes = "abcd"[:order]
            to = axes.replace(axes[i], "z")
            expected = torch.einsum(f"{n}z{axes[i]},{n}{axes}->{n}{to}", root, expected)
    assert torch.allclose(precondition(x, roots, block_ndim), expected, rtol=1e-12, atol=1e-12)


def test_roots_of_each_order() -> None:
    """X = L^(-1/2k) on every side, from statistics of full rank."""
    for order in (1, 2, 3):
        shape = (2, 3, 4)[:order]
        grads = [{"g": randn(*shape, seed=t)} for t in range(12)]
        tx = fs.chain(
            fs.kronecker_statistics(1.0), fs.root_inverse(12, start=12, solver=linalg.eigh())
        )
        _, state = run(tx, grads)
        for i, side in enumerate(state["root_inverse"].kept["g"]):
            unfolded = [unfold(g["g"], i) for g in grads]
            total = sum(u @ u.T for u in unfolded)
            power = torch.linalg.matrix_power(side.value[0], 2 * order)
            assert torch.allclose(power @ total, torch.eye(shape[i], dtype=D), atol=1e-7)


def test_exponents() -> None:
    assert side_exponents(()) == ()
    assert side_exponents((2, 3, 4)) == (1 / 6,) * 3
    assert side_exponents((3, 5), {2: 0.5}) == (0.5, 0.5)
    assert side_exponents((3, 5), {3: 0.5}) == (0.25, 0.25)
    tx = fs.chain(
        fs.kronecker_statistics(1.0, exponents={2: {0: 0.5, 1: 0.0}}),
        fs.root_inverse(1, exponents={2: {0: 0.5, 1: 0.0}}, solver=linalg.eigh()),
    )
    g = randn(3, 5)
    (updates,), state = run(tx, [{"g": g}])
    assert torch.allclose(updates["g"] @ updates["g"].T, torch.eye(3, dtype=D), atol=1e-8)
    assert state["kronecker_statistics"].factors["g"][1] == ()
    assert state["root_inverse"].kept["g"][1] == ()


def test_exponents_that_differ_between_the_stages() -> None:
    tx = fs.chain(fs.kronecker_statistics(1.0, exponents={1: 0.0}), fs.root_inverse(1))
    with pytest.raises(ValueError, match="give both stages the same exponents"):
        run(tx, [{"g": randn(3)}])


@pytest.mark.parametrize(
    "stage", [fs.root_inverse(5), fs.graft(fs.root_inverse(5), fs.scale_by_sgd())]
)
def test_a_missing_upstream_stage_names_itself_and_the_remedy(stage: Any) -> None:
    for tx in (fs.chain(stage), fs.blocked(fs.chain(fs.ema(0.9), stage))):
        with pytest.raises(
            ValueError, match=r"root_inverse found no factor matrices: put kronecker"
        ):
            tx.init(problem())


@pytest.mark.parametrize("stage", [fs.root_inverse(5), fs.in_eigenbasis(fs.scale_by_adam())])
def test_so_does_one_outside_of_a_chain(stage: Any) -> None:
    with pytest.raises(ValueError, match="found no factor matrices: put kronecker"):
        stage.init(problem())


def test_refresh_schedule_and_the_identity_before_it() -> None:
    tx = fs.chain(fs.kronecker_statistics(1.0), fs.root_inverse(3, start=5))
    grads = [{"g": randn(4, seed=t)} for t in range(10)]
    state, roots = tx.init(grads[0]), [torch.eye(4, dtype=D)]
    changed = []
    for t, g in enumerate(grads, start=1):
        u, state = tx.update(g, state)
        root = state["root_inverse"].kept["g"][0].value[0]
        if not torch.equal(root, roots[-1]):
            changed.append(t)
        if t < 5:
            assert torch.equal(u["g"], g["g"])
        roots.append(root)
    assert changed == [5, 6, 9]


def test_step_and_refresh_in_the_context_decide() -> None:
    tx = fs.chain(fs.kronecker_statistics(1.0), fs.root_inverse(3, start=3))
    g = {"g": randn(4)}
    state = tx.init(g)

    def refreshed(**context: Any) -> bool:
        _, new = tx.update(g, state, **context)
        return not torch.equal(new["root_inverse"].kept["g"][0].value[0], torch.eye(4, dtype=D))

    assert refreshed(step=3)
    assert not refreshed(step=4)
    assert refreshed(step=4, refresh=True)
    assert not refreshed(step=3, refresh=False)
    with pytest.raises(ValueError, match="step is 0; it counts from 1"):
        refreshed(step=0)
    with pytest.raises(TypeError, match="step is a float"):
        refreshed(step=3.0)


def test_a_failing_solver_keeps_the_old_root_and_counts() -> None:
    """For the matrices that failed, and for no others."""

    def solver(matrix: torch.Tensor, p: float, epsilon: Any) -> InverseRoot:
        found = linalg.eigh()(matrix, p, 1e-3)
        good = torch.tensor([True, False, True])
        return found._replace(converged=good, root=found.root * 7)

    tx = fs.blocked(fs.chain(fs.kronecker_statistics(1.0), fs.root_inverse(1, solver=solver)), 2)
    g = {"g": randn(6)}
    _, state = tx.update(g, tx.init(g))
    kept = find_state(state, Kept)
    assert kept is not None
    assert kept.failures.tolist() == [0, 1, 0]
    assert kept.rounds.tolist() == [1, 0, 1]
    assert torch.equal(kept.value[0][1], torch.eye(2, dtype=D))
    assert not torch.equal(kept.value[0][0], torch.eye(2, dtype=D))
    _, state = tx.update(g, state)
    assert find_state(state, Kept).failures.tolist() == [0, 2, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "solver",
    [
        linalg.eigh(relative_epsilon=1e-6),
        linalg.coupled_newton(),
        linalg.newton_schulz(),
        linalg.pseudo_inverse(),
    ],
)
def test_a_non_finite_block_spares_the_others(solver: Any) -> None:
    tx = fs.blocked(fs.chain(fs.kronecker_statistics(1.0), fs.root_inverse(1, solver=solver)), 4)
    g = {"g": randn(8, 3).float()}
    bad = {"g": g["g"].clone()}
    bad["g"][0, 0] = float("nan")
    good_updates, _ = tx.update(g, tx.init(g))
    bad_updates, state = tx.update(bad, tx.init(g))
    assert torch.equal(bad_updates["g"][4:], good_updates["g"][4:])
    assert find_state(state, Kept).failures.tolist() == [1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [fs.root_inverse, functools.partial(fs.shampoo, 0.1)])
@pytest.mark.parametrize("epsilon", [1e-3, torch.tensor(0.0)], ids=str)
def test_damping_of_a_pseudo_inverse_is_refused_before_any_step(make: Any, epsilon: Any) -> None:
    with pytest.raises(ValueError, match="epsilon must be the number 0 for pseudo_inverse"):
        make(epsilon=epsilon, solver=linalg.pseudo_inverse())


def test_a_number_that_was_made_a_tensor_is_named_as_one() -> None:
    """The error said that the number must be 0, and got 0.0."""
    make, options = fs.inject_hyperparams, {"epsilon": 0.0, "solver": linalg.pseudo_inverse()}
    with pytest.raises(ValueError, match=r"got tensor\(0\..* static_args=\['epsilon'\]"):
        make(fs.shampoo)(0.1, **options)
    make(fs.shampoo, static_args=["epsilon"])(0.1, **options)


def test_damping_of_a_pseudo_inverse_by_a_live_number_is_refused_on_any_step() -> None:
    """Not on the next refresh, when the statistics have been written to."""
    params = {"w": torch.ones(2, 3)}
    tx = fs.shampoo(0.1, start=3, epsilon=Live("epsilon", 0.0), solver=linalg.pseudo_inverse())
    state = tx.init(params)
    with pytest.raises(ValueError, match="number 0 for pseudo_inverse, got 0.1"):
        tx.update(params, state, params, hyper={"epsilon": 0.1})
    tx.update(params, state, params, hyper={"epsilon": 0.0})


def test_trace_scaling() -> None:
    g = randn(3, 4)
    tx = fs.chain(
        fs.kronecker_statistics(1.0),
        fs.root_inverse(1, epsilon=1e-3, trace_scaling=0.5, solver=linalg.eigh()),
    )
    _, state = run(tx, [{"g": g}])
    a = g @ g.T
    a = a / a.trace().sqrt() + 1e-3 * torch.eye(3, dtype=D)
    root = state["root_inverse"].kept["g"][0].value[0]
    assert torch.allclose(torch.linalg.matrix_power(root, 4) @ a, torch.eye(3, dtype=D), atol=1e-8)


def test_graft_takes_direction_and_length_per_block() -> None:
    tx = fs.blocked(
        fs.graft(fs.scale(torch.tensor(5.0)), onto=fs.scale_by_adagrad(0.0)), 2, merge="none"
    )
    g = {"w": randn(4)}
    (updates,), _ = run(tx, [g])
    for piece, source in zip(updates["w"].split(2), g["w"].split(2)):
        assert piece.norm().item() == pytest.approx(2**0.5)  # that of the signs
        assert torch.allclose(piece / piece.norm(), source / source.norm())


def test_graft_is_the_other_method_before_its_start() -> None:
    tx = fs.graft(fs.scale(5.0), onto=fs.scale_by_adagrad(0.0), start=3)
    history, _ = run(tx, [{"w": randn(3, seed=t)} for t in range(4)])
    alone, _ = run(fs.scale_by_adagrad(0.0), [{"w": randn(3, seed=t)} for t in range(4)])
    same = [torch.equal(a["w"], b["w"]) for a, b in zip(history, alone)]
    assert same == [True, True, False, False]
    with pytest.raises(ValueError, match="start is 0"):
        fs.graft(fs.scale(1.0), fs.scale(1.0), start=0)


@pytest.mark.parametrize("silent", ["direction", "onto"])
def test_graft_of_what_has_no_update_has_none(silent: str) -> None:
    """A stage may answer None where there is a gradient; of fewer sides `onto` decides alone."""
    quiet = fs.stateless(lambda u: u | {"w": None, "v": None})
    make = {"direction": fs.scale(2.0), "onto": fs.scale(3.0)} | {silent: quiet}
    tx = fs.graft(**make, least_order=2)
    g = {"w": torch.ones(2, 2), "v": torch.ones(2), "other": torch.ones(2, 2)}
    updates, _ = tx.update(g, tx.init(g))
    assert updates["w"] is None
    assert (updates["v"] is None) == (silent == "onto")
    length = 1.0 if silent == "onto" else 3.0
    torch.testing.assert_close(updates["other"], torch.full((2, 2), length))


def test_grafting_a_zero_gradient_is_zero_not_nan() -> None:
    tx = fs.shampoo(0.1)
    zero = {"w": torch.zeros(3, 2)}
    updates, _ = tx.update(zero, tx.init(zero), zero)
    assert torch.equal(updates["w"], zero["w"])


def test_the_second_moment_of_a_partner_is_of_the_gradient() -> None:
    """In a scope: V from `gradient`, applied to the filtered updates."""
    tx = fs.blocked(fs.chain(fs.ema(0.5, bias_correction=False), fs.scale_by_rms(0.75, 0.0)))
    (u,), _ = run(tx, [{"w": torch.tensor([4.0, -4.0])}])
    assert u["w"].tolist() == [1.0, -1.0]  # 0.5 g / (0.5 |g|)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("ahead", [{}, {"beta3": 0.5}, {"nesterov": True}], ids=str)
def test_updates_of_averages_are_in_memory_of_their_own(
    ahead: dict[str, Any], bias_correction: bool
) -> None:
    """Nor do they change when the next donated step writes to the state, and never the gradient."""
    stages = [fs.ema(0.9, bias_correction=bias_correction, **ahead)]
    stages += [fs.trace(0.9, nesterov=True), fs.trace(0.9)] if not ahead else []
    for stage in stages:
        g = {"w": torch.arange(6.0).reshape(2, 3)}
        given, state = g["w"].clone(), stage.init(g)
        for _ in range(2):
            updates, state = stage.update(g, state, donate=True)
            kept = updates["w"].clone()
            mine = {x.untyped_storage().data_ptr() for x in (*tensors(state), g["w"])}
            assert updates["w"].untyped_storage().data_ptr() not in mine
            _, state = stage.update(g, state, donate=True)
            assert torch.equal(updates["w"], kept)
            assert torch.equal(g["w"], given)


def test_ema_follows_changing_betas_and_stays_a_weighted_mean() -> None:
    """A constant gradient comes out unchanged whatever the decays have been."""
    params = {"w": torch.tensor([3.0], dtype=D)}
    state = fs.ema(0.9).init(params)
    for beta in (0.9, 0.5, 0.99, 0.0001):
        u, state = fs.ema(torch.tensor(beta, dtype=D)).update(params, state)
        assert u["w"].item() == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_ema_without_memory_still_looks_ahead_from_the_last_update(bias_correction: bool) -> None:
    """beta1=0 made it the identity, whatever beta3 said."""
    grads = [{"g": randn(3, seed=t)} for t in range(4)]
    last = torch.zeros(3, dtype=D)
    tx = fs.guarded(fs.ema(0.0, 0.4, bias_correction=bias_correction))
    history, state = run(tx, grads)
    for t, (u, g) in enumerate(zip(history, grads, strict=True)):
        total = 0.6 if bias_correction and t == 0 else 1.0
        assert torch.allclose(u["g"], (0.4 * last + 0.6 * g["g"]) / total, rtol=1e-12)
        last = g["g"]
    held = {"g": torch.full((3,), float("nan"), dtype=D)}
    for _ in range(2):
        u, state = tx.update(held, state)
        assert not u["g"].any()
    u, _ = tx.update(grads[0], state)
    assert u["g"].isfinite().all()


def test_clip_by_global_norm_agrees_with_torch_and_is_exact_below() -> None:
    g = gradients(1)[0]
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in tensors(g)]
    for p, x in zip(parameters, tensors(g)):
        p.grad = x.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    assert fs.global_norm(g).item() == pytest.approx(norm.item(), rel=1e-12)  # type: ignore[union-attr]
    clipped, _ = fs.clip_by_global_norm(0.5).update(g, fs.EmptyState())
    for a, p in zip(tensors(clipped), parameters):
        assert p.grad is not None
        assert torch.allclose(a, p.grad, rtol=1e-5)
    assert fs.global_norm(clipped).item() == pytest.approx(0.5, rel=1e-12)  # type: ignore[union-attr]
    same, _ = fs.clip_by_global_norm(norm.item() * 1.001).update(g, fs.EmptyState())
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(g)))


def test_clip() -> None:
    g = {"w": torch.tensor([-3.0, 0.1, 2.0], dtype=torch.bfloat16)}
    clipped, _ = fs.clip(torch.tensor(1.0)).update(g, fs.EmptyState())
    assert clipped["w"].dtype == torch.float32
    assert clipped["w"].tolist() == [-1.0, 0.10009765625, 1.0]


def test_decayed_weights_need_parameters() -> None:
    tx = fs.adamw(0.1)
    with pytest.raises(ValueError, match="pass params to update"):
        tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))


def test_statistics_of_bfloat16_gradients_do_not_stick() -> None:
    """Measured elsewhere: an EMA kept in bfloat16 would stall far below its limit."""
    g = {"w": torch.ones(1, dtype=torch.bfloat16)}
    tx = fs.kronecker_statistics(0.99, bias_correction=False)
    state = tx.init(g)
    for _ in range(500):
        _, state = tx.update(g, state)
    assert isinstance(state, KroneckerState)
    assert state.factors["w"][0].item() == pytest.approx(1 - 0.99**500, rel=1e-4)


def test_empty_parameters_outside_blocks() -> None:
    params = {"none": torch.zeros(3, 0, 2), "some": randn(3)}
    tx = fs.chain(fs.kronecker_statistics(), fs.root_inverse(1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["none"].shape == (3, 0, 2)


def test_a_plain_sum_is_asked_for_by_a_tensor_too() -> None:
    g = {"w": randn(3)}
    for beta2 in (1.0, torch.tensor(1.0)):
        tx = fs.kronecker_statistics(beta2)
        state = tx.init(g)
        for _ in range(2):
            _, state = tx.update(g, state)
        assert torch.allclose(state.factors["w"][0], 2 * torch.outer(g["w"], g["w"]))


def test_the_root_before_the_first_refresh() -> None:
    tx = fs.chain(fs.kronecker_statistics(), fs.root_inverse(5, start=5, initial_eigenvalue=16.0))
    g = {"matrix": randn(3, 2), "vector": randn(3)}
    updates, _ = tx.update(g, tx.init(g), g)
    for name, u in updates.items():
        assert torch.allclose(u, g[name] / 4)  # 16^(-1/4) a side of two, 16^(-1/2) of one


OF_EVERYONE = {
    "ema": lambda: fs.ema(0.9, own_steps=False),
    "scale_by_adam": lambda: fs.scale_by_adam(own_steps=False),
    "scale_by_second_moment": lambda: fs.scale_by_second_moment(own_steps=False),
    "root_inverse": lambda: fs.chain(
        fs.kronecker_statistics(own_steps=False), fs.root_inverse(1, exponents=0.5)
    ),
}
"""Of gradients of 1 these make steps of 1, from the first on."""


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", OF_EVERYONE)
def test_a_step_of_everyone_counts_once(name: str, bare: bool, donate: bool) -> None:
    """Also of a tree that is one tensor, whose weight is one tensor like that of everyone."""
    g: Any = torch.ones(1, dtype=D) if bare else {"a": torch.ones(1, dtype=D)}
    tx = OF_EVERYONE[name]()
    state = tx.init(g)
    for _ in range(3):
        u, state = tx.update(g, state, donate=donate)
        assert torch.allclose(u if bare else u["a"], torch.ones(1, dtype=D), rtol=1e-5)
