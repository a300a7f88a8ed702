"""torch.func, autograd and torch.compile around the solvers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from funshampoo.linalg import Solver, coupled_newton, eigh, newton_schulz, pseudo_inverse

from .spectra import log_spaced, low_rank, orthogonal, with_spectrum

MAKERS: dict[str, Callable[[float | Tensor], Solver]] = {
    "eigh": lambda relative: eigh(relative_epsilon=relative),
    "eigh-shift": lambda relative: eigh(relative_epsilon=relative, floor=False),
    "coupled_newton": lambda relative: coupled_newton(relative_epsilon=relative, tolerance=1e-13),
    "newton_schulz": lambda relative: newton_schulz(relative_epsilon=relative, tolerance=1e-13),
}

D = 4
SPECTRA = {
    "distinct": log_spaced(D, 100),
    "all tied": torch.full((D,), 0.7, dtype=torch.float64),
    "two tied": torch.tensor([1.0, 0.3, 0.3, 0.1], dtype=torch.float64),
    "nearly tied": torch.tensor([1.0, 0.3, 0.3 + 1e-9, 0.1], dtype=torch.float64),
}


WEIGHTS = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
"""A cotangent without symmetry: a sum of entries could hide a missing transpose."""


def symmetric_direction() -> Tensor:
    W = WEIGHTS.roll(1)
    return W + W.mT


def finite_difference(f: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, h: float) -> Tensor:
    """Central difference of fourth order."""
    d1, d2 = (f(at + k * h * along) - f(at - k * h * along) for k in (1, 2))
    return (8 * d1 - d2) / (12 * h)


def scalar(make: str, p: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda A, eps, rel: (MAKERS[make](rel)(A, p, eps).root * WEIGHTS).sum()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gradients_match_finite_differences(make: str, p: int, spectrum: str) -> None:
    Q = torch.eye(D).double() if spectrum == "all tied" else orthogonal(D, 1)[0]
    A, f = with_spectrum(Q, SPECTRA[spectrum]), scalar(make, p)
    # λmax has no derivative where it is tied, so relative damping only joins where it is not.
    relative = torch.tensor(0.0 if spectrum == "all tied" else 0.05, dtype=torch.float64)
    epsilon = torch.tensor(0.1, dtype=torch.float64)
    dA, d_epsilon, d_relative = grad(f, argnums=(0, 1, 2))(A, epsilon, relative)

    E = symmetric_direction()
    one = torch.ones((), dtype=torch.float64)
    numerical = finite_difference(lambda A: f(A, epsilon, relative), A, E, 1e-4)
    torch.testing.assert_close((dA * E).sum(), numerical, rtol=1e-6, atol=1e-8)
    numerical = finite_difference(lambda e: f(A, e, relative), epsilon, one, 1e-4)
    torch.testing.assert_close(d_epsilon, numerical, rtol=1e-6, atol=1e-8)
    numerical = finite_difference(lambda r: f(A, epsilon, r), relative, one, 1e-4)
    torch.testing.assert_close(d_relative, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_gradient_at_zero(make: str, p: int) -> None:
    """A = 0 with damping: d (A + εI)^(-1/p) = -1/p ε^(-1/p - 1) dA exactly."""
    epsilon = torch.tensor(0.1, dtype=torch.float64)
    A = torch.zeros(D, D, dtype=torch.float64)
    dA, d_epsilon = grad(scalar(make, p), argnums=(0, 1))(A, epsilon, torch.tensor(0.0))
    slope = -1 / p * epsilon ** (-1 / p - 1)
    E = symmetric_direction()
    torch.testing.assert_close((dA * E).sum(), slope * (WEIGHTS * E).sum())
    torch.testing.assert_close(d_epsilon, slope * WEIGHTS.trace())


def test_gradient_of_the_pseudo_inverse_at_constant_rank() -> None:
    Q = orthogonal(D, 1)[0]
    A = with_spectrum(Q, torch.tensor([1.0, 0.5, 0.5, 0.0], dtype=torch.float64))

    def f(E: Tensor) -> Tensor:  # a congruence keeps the rank
        S = torch.eye(D, dtype=torch.float64) + E
        return (pseudo_inverse(rtol=1e-8)(S @ A @ S.mT, 4, 0.0).root * WEIGHTS).sum()

    zero = torch.zeros(D, D, dtype=torch.float64)
    E = WEIGHTS.roll(2)
    numerical = finite_difference(f, zero, E, 1e-4)
    torch.testing.assert_close((grad(f)(zero) * E).sum(), numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", MAKERS)
def test_vmap_equals_loop(make: str) -> None:
    A = with_spectrum(orthogonal(D, 6), SPECTRA["two tied"]).reshape(3, 2, D, D)
    epsilon = torch.tensor([0.1, 0.2, 0.3])
    solve = MAKERS[make](0.01)
    expected = [solve(a, 4, e) for a, e in zip(A, epsilon, strict=True)]
    # Batched along the first axis, along another, and the hyperparameter alone.
    for in_dim in (0, 1):
        batched = vmap(lambda a, e: solve(a, 4, e), in_dims=(in_dim, 0))(
            A.movedim(0, in_dim), epsilon
        )
        for field, values in zip(batched, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(field, torch.stack(values), rtol=1e-9, atol=1e-12)
    roots = vmap(lambda e: solve(A[0], 4, e).root)(epsilon)
    torch.testing.assert_close(roots, torch.stack([solve(A[0], 4, e).root for e in epsilon]))


@pytest.mark.parametrize("make", MAKERS)
def test_vmap_of_grad_and_grad_of_vmap(make: str) -> None:
    A = torch.stack([with_spectrum(orthogonal(D, 1)[0], values) for values in SPECTRA.values()])
    f = lambda a, e, r: (MAKERS[make](r)(a, 4, e).root * WEIGHTS).sum()  # noqa: E731
    epsilon = torch.tensor(0.1, dtype=torch.float64)
    # None where λmax is tied, as above: which probe's derivative it has is a matter of rounding.
    relative = torch.tensor([0.0 if name == "all tied" else 0.01 for name in SPECTRA]).double()
    expected = torch.stack([grad(f)(a, epsilon, r) for a, r in zip(A, relative)])
    found = vmap(grad(f), in_dims=(0, None, 0))(A, epsilon, relative)
    torch.testing.assert_close(found, expected)
    total = lambda A: vmap(f, in_dims=(0, None, 0))(A, epsilon, relative).sum()  # noqa: E731
    torch.testing.assert_close(grad(total)(A), expected)
    epsilons = torch.tensor([0.1, 0.2], dtype=torch.float64)
    by_epsilon = vmap(grad(f, argnums=1), in_dims=(None, 0, None))(A[0], epsilons, relative[0])
    expected = torch.stack([grad(f, argnums=1)(A[0], e, relative[0]) for e in epsilons])
    torch.testing.assert_close(by_epsilon, expected)


@pytest.mark.parametrize("make", ["eigh", "eigh-shift"])
def test_second_derivatives_by_eigendecomposition_are_an_error(make: str) -> None:
    A, f = with_spectrum(orthogonal(D, 1)[0], SPECTRA["distinct"]), scalar(make, 4)
    epsilon, relative = torch.tensor(0.1), torch.tensor(0.1)
    for n in (0, 1):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            jacrev(grad(f, argnums=n), argnums=n)(A, epsilon, relative)
    A.requires_grad_()
    (first,) = torch.autograd.grad(f(A, epsilon, relative), A, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), A)


@pytest.mark.parametrize("make", ["coupled_newton", "newton_schulz"])
def test_second_derivatives_of_iterations_are_right(make: str) -> None:
    A, f = with_spectrum(orthogonal(D, 1)[0], SPECTRA["distinct"]), scalar(make, 4)
    epsilon, relative = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.0)
    E = symmetric_direction()
    slope = lambda A: (grad(f)(A, epsilon, relative) * E).sum()  # noqa: E731
    numerical = finite_difference(slope, A, E, 1e-4)
    torch.testing.assert_close((grad(slope)(A) * E).sum(), numerical, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["eigh", "eigh-shift", "newton_schulz", "pseudo_inverse"])
def test_compiles_without_graph_breaks(make: str) -> None:
    solve = pseudo_inverse() if make == "pseudo_inverse" else MAKERS[make](1e-3)
    A = with_spectrum(orthogonal(8), low_rank(8, 5), torch.float32)
    compiled = torch.compile(lambda A: solve(A, 4, 0.0), fullgraph=True, backend="aot_eager")
    for eager, graph in zip(solve(A, 4, 0.0), compiled(A), strict=True):
        torch.testing.assert_close(eager, graph)


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1])
def test_coupled_newton_compiles_by_running_masked(retries: int) -> None:
    solve = coupled_newton(relative_epsilon=0.0, max_iterations=8, retries=retries)
    A = with_spectrum(orthogonal(3), log_spaced(3, 2), torch.float32)
    assert solve(A, 2, 0.0).converged.all()
    compiled = torch.compile(lambda A: solve(A, 2, 0.0), fullgraph=True, backend="aot_eager")
    for eager, graph in zip(solve(A, 2, 0.0), compiled(A), strict=True):
        torch.testing.assert_close(eager, graph)


@pytest.mark.slow
def test_newton_schulz_compiles_where_sides_vary() -> None:
    """How many steps there are follows from the side, which is a symbol then."""
    solve = newton_schulz()
    compiled = torch.compile(
        lambda A: solve(A, 4, 0.0), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for d in (5, 9):
        A = with_spectrum(orthogonal(d), log_spaced(d, 10), torch.float32)
        torch.testing.assert_close(compiled(A).root, solve(A, 4, 0.0).root, rtol=1e-4, atol=1e-4)
