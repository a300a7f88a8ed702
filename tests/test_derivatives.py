"""Derivatives through training, backward and forward, against finite differences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

import funshampoo as fs
from funshampoo import linalg
from funshampoo.recipes import RECIPES

SIDE = 5  # square, so that after one gradient no factor matrix has a null space
STEPS = 5


def _problem() -> tuple[Tensor, ...]:
    """Inputs, targets, initial weights, and a direction to move them in."""
    make = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, SIDE, generator=make, dtype=torch.float64) for n in (16, 16, 5, 5)]
    return drawn[0] * torch.logspace(0, -1, SIDE, dtype=torch.float64), *drawn[1:]


X, Y, WEIGHTS, DIRECTION = _problem()


def loss(params: dict[str, Tensor]) -> Tensor:
    return (torch.tanh(X @ params["w"] - Y) ** 2).mean()


def gradient(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the loss in plain operators, for those who open a level of forward mode by themselves."""
    r = torch.tanh(X @ params["w"] - Y)
    return {"w": X.T @ (2 * r * (1 - r**2)) / r.numel()}


def trained(recipe: Callable[..., Any], **options: Any) -> Callable[[Tensor], Tensor]:
    """weights -> the loss after some steps from there."""
    known = inspect.signature(recipe).parameters
    options = {name: x for name, x in {"every": 2, **options}.items() if name in known}

    def run(weights: Tensor) -> Tensor:
        tx, params = recipe(0.02, **options), {"w": weights}
        state = tx.init(params)
        for _ in range(STEPS):
            updates, state = tx.update(gradient(params), state, params)
            params = fs.apply_updates(params, updates)
        return loss(params)

    return run


def difference(run: Callable[[Tensor], Tensor]) -> float:
    """The central one, where two steps agree that it is one."""
    found = [
        float((run(WEIGHTS + h * DIRECTION) - run(WEIGHTS - h * DIRECTION)) / (2 * h))
        for h in (1e-5, 3e-6)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4), "not differentiable here"
    assert abs(found[0]) > 1e-3
    return found[0]


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: trained(recipe) for name, recipe in RECIPES.items()},
    "shampoo, pseudo_inverse": trained(
        fs.shampoo, solver=linalg.pseudo_inverse(), relative_epsilon=0.0
    ),
    "shampoo, newton_schulz": trained(fs.shampoo, solver=linalg.newton_schulz(tolerance=1e-12)),
    "shampoo, coupled_newton": trained(fs.shampoo, solver=linalg.coupled_newton(tolerance=1e-12)),
    "shampoo, an old basis": trained(fs.shampoo, basis_tolerance=0.1),
    "shampoo, an older basis": trained(fs.shampoo, basis_tolerance=10.0, every=1),
    "soap, eigh": trained(fs.soap, basis=linalg.eigh()),
    "soap, by_rank": trained(fs.soap, basis=linalg.by_rank()),
    "kl_shampoo, often": trained(fs.kl_shampoo, every=1),
}


def forward(run: Callable[[Tensor], Tensor]) -> float:
    return float(jvp(run, (WEIGHTS,), (DIRECTION,))[1])


def forward_by_hand(run: Callable[[Tensor], Tensor]) -> float:
    """Without torch.func, which wraps tensors."""
    with forward_ad.dual_level():
        found = run(forward_ad.make_dual(WEIGHTS, DIRECTION))
        return float(forward_ad.unpack_dual(found).tangent)


def backward(run: Callable[[Tensor], Tensor]) -> float:
    return float((grad(run)(WEIGHTS) * DIRECTION).sum())


def backward_by_hand(run: Callable[[Tensor], Tensor]) -> float:
    weights = WEIGHTS.clone().requires_grad_()
    return float((torch.autograd.grad(run(weights), weights)[0] * DIRECTION).sum())


WAYS = (forward, forward_by_hand, backward, backward_by_hand)


@pytest.mark.parametrize("name", CASES)
def test_every_way_agrees_with_differences(name: str) -> None:
    expected = difference(CASES[name])
    for way in WAYS:
        assert way(CASES[name]) == pytest.approx(expected, rel=1e-5), way.__name__


def by_rate(recipe: Callable[..., Any], **options: Any) -> Callable[[Tensor], Tensor]:
    """learning rate -> the loss after some steps."""

    def run(rate: Tensor) -> Tensor:
        tx, params = recipe(rate, **options), {"w": WEIGHTS}
        state = tx.init(params)
        for _ in range(STEPS):
            updates, state = tx.update(grad(loss)(params), state, params)
            params = fs.apply_updates(params, updates)
        return loss(params)

    return run


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_soap", "newton_schulz"])
def test_forward_mode_and_vmap_in_either_order(name: str) -> None:
    """Slopes along many rates at once; no transform hides a derivative from a solver."""
    run, within = by_rate(RECIPES.get(name, fs.shampoo), every=2), 1e-9
    if name == "newton_schulz":  # whose iterations go further where a derivative is wanted
        run, within = by_rate(fs.shampoo, every=2, solver=linalg.newton_schulz()), 1e-7
    rates = torch.tensor([0.01, 0.03], dtype=torch.float64)
    expected = torch.stack([grad(run)(rate) for rate in rates])
    ones = torch.ones(2, dtype=torch.float64)
    found = {
        "vmap of jvp": vmap(lambda r, v: jvp(run, (r,), (v,))[1])(rates, ones),
        "jvp of vmap": jvp(vmap(run), (rates,), (ones,))[1],
        "vmap of jacfwd": vmap(jacfwd(run))(rates),
        "grad of vmap": grad(lambda r: vmap(run)(r).sum())(rates),
    }
    for way, slopes in found.items():
        torch.testing.assert_close(slopes, expected, rtol=within, atol=0, msg=way)


def test_second_derivatives_of_roots_by_decompositions_are_refused() -> None:
    run = by_rate(fs.shampoo, every=2)
    rate, one = (torch.tensor(x, dtype=torch.float64) for x in (0.02, 1.0))
    for second in (
        lambda: grad(grad(run))(rate),
        lambda: jacfwd(grad(run))(rate),
        lambda: grad(lambda r: jvp(run, (r,), (one,))[1])(rate),
        lambda: jacfwd(jacfwd(run))(rate),
    ):
        with pytest.raises(NotImplementedError, match=r"newton_schulz\(\)|hessian"):
            second()


def test_second_derivatives_by_products() -> None:
    run = by_rate(fs.shampoo, every=2, solver=linalg.newton_schulz(tolerance=1e-7))
    rate, h = torch.tensor(0.02, dtype=torch.float64), 1e-5
    expected = (grad(run)(rate + h) - grad(run)(rate - h)) / (2 * h)
    for second in (grad(grad(run)), jacfwd(grad(run)), jacfwd(jacfwd(run))):
        torch.testing.assert_close(second(rate), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_and_null_spaces_have_finite_derivatives(dtype: torch.dtype) -> None:
    """Where there is none: of eigenvectors that rounding chose."""
    weights = torch.zeros(6, 3, dtype=dtype)
    grads = torch.zeros(6, 3, dtype=dtype)
    grads[0, 0] = grads[1, 1] = 2.0  # a tie, and a null space on both sides

    def run(factor: Tensor) -> Tensor:
        tx, params = fs.soap(0.1, every=1, basis=linalg.eigh()), {"w": weights}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update({"w": grads * factor}, state, params)
            params = fs.apply_updates(params, updates)
        return (params["w"] - 1).square().sum()

    one = torch.ones((), dtype=dtype)
    assert grad(run)(one).isfinite()
    assert jvp(run, (one,), (one,))[1].isfinite()


ON_ZEROS: dict[str, Callable[..., Any]] = {
    **RECIPES,
    "newton_schulz": lambda rate: fs.shampoo(rate, every=1, solver=linalg.newton_schulz()),
    "clip_by_global_norm": lambda rate: _before_rate(fs.clip_by_global_norm(1.0), rate),
    "adaptive_clip": lambda rate: _before_rate(fs.adaptive_clip(0.1), rate),
    "normalize_rows": lambda rate: _before_rate(fs.normalize_rows(), rate),
    "schatten4": lambda rate: _before_rate(fs.orthogonalize(norm="schatten4"), rate),
    "update_floor": lambda rate: fs.chain(fs.sgd(rate), fs.update_floor(0.1)),
    "hyperball": lambda rate: fs.chain(fs.scale_by_adam(), fs.hyperball(rate)),
}


def _before_rate(stage: Any, rate: Tensor) -> Any:
    return fs.chain(stage, fs.scale_by_learning_rate(rate))


@pytest.mark.parametrize("name", ON_ZEROS)
def test_second_derivatives_where_a_gradient_is_zeros(name: str) -> None:
    """Norms of zeros have none in torch, in reverse mode twice: NaN, of the whole training."""
    w, v = (torch.full((4, 3), x, dtype=torch.float64) for x in (1.0, 0.0))

    def run(rate: Tensor) -> Tensor:
        tx, params = ON_ZEROS[name](rate), {"w": w, "v": v.mT}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({k: 0 * p for k, p in params.items()}, state, params)
            params = fs.apply_updates(params, updates)
        return torch.stack([p.square().sum() for p in params.values()]).sum()

    rate, h = torch.tensor(0.05, dtype=torch.float64), 1e-5
    expected = (grad(run)(rate + h) - grad(run)(rate - h)) / (2 * h)
    for second in (grad(grad(run)), jacfwd(grad(run))):
        torch.testing.assert_close(second(rate), expected, rtol=1e-5, atol=1e-8)
