"""Roots against the float64 truth of matrices built from their spectrum."""

from __future__ import annotations

import pytest
import torch

from funshampoo.linalg import coupled_newton, eigh, newton_schulz, pseudo_inverse
from tests.sooner import these

from .spectra import (
    DTYPES,
    NAMES,
    log_spaced,
    low_rank,
    orthogonal,
    relative_error,
    solvers,
    tolerance,
    with_spectrum,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", these([1, 2, 3, 4, 5, 6, 8, 12], sooner=[1, 2, 4]))
def test_every_size(name: str, p: int, dtype: torch.dtype) -> None:
    for d in (1, 2, 3, 5, 8, 17, 32, 64, 128):
        Q, values = orthogonal(d), log_spaced(d, 1e4)
        result = solvers(dtype)[name](with_spectrum(Q, values, dtype), p, 0.0)
        assert result.converged.all()
        error = relative_error(result.root, with_spectrum(Q, values ** (-1 / p)))
        assert error < tolerance(d, 1e4, p, dtype), d
        asymmetry = (result.root - result.root.mT).abs().max()
        assert asymmetry <= 8 * torch.finfo(dtype).eps * result.root.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_side_512(name: str) -> None:
    Q, values = orthogonal(512, count=1), log_spaced(512, 1e4)
    result = solvers(torch.float32)[name](with_spectrum(Q, values, torch.float32), 4, 0.0)
    error = relative_error(result.root, with_spectrum(Q, values**-0.25))
    assert error < tolerance(512, 1e4, 4, torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e12])
def test_every_condition_in_float64(name: str, p: int, condition: float) -> None:
    Q, values = orthogonal(32), log_spaced(32, condition)
    result = solvers(torch.float64, condition)[name](with_spectrum(Q, values), p, 0.0)
    assert result.converged.all()
    error = relative_error(result.root, with_spectrum(Q, values ** (-1 / p)))
    assert error < tolerance(32, condition, p, torch.float64)
    # Off by rounding at the condition number, and by the power iterations' estimate.
    torch.testing.assert_close(
        result.condition, torch.full((3,), condition).double(), rtol=0.15, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 1, 8, 16])
def test_rank_deficient_with_damping(name: str, rank: int, dtype: torch.dtype) -> None:
    epsilon = 1e-4
    Q, values = orthogonal(16), low_rank(16, rank)
    result = solvers(dtype)[name](with_spectrum(Q, values, dtype), 4, epsilon)
    assert result.converged.all()
    truth = with_spectrum(Q, (values + epsilon) ** -0.25)
    assert relative_error(result.root, truth) < tolerance(16, 1 / epsilon, 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e20])
def test_every_scale(name: str, scale: float, dtype: torch.dtype) -> None:
    for p in (2, 3, 4):
        Q, values = orthogonal(17), low_rank(17, 9) * scale
        result = solvers(dtype)[name](with_spectrum(Q, values, dtype), p, 1e-3 * scale)
        assert result.converged.all()
        truth = with_spectrum(Q, (values + 1e-3 * scale) ** (-1 / p))
        assert relative_error(result.root, truth) < tolerance(17, 1e3, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.5, 1, 2.5, 1 / 0.3, 6])
def test_any_exponent_by_eigendecomposition(p: float, dtype: torch.dtype) -> None:
    Q, values = orthogonal(17), log_spaced(17, 1e3)
    A, truth = with_spectrum(Q, values, dtype), with_spectrum(Q, values ** (-1 / p))
    for solver in (eigh(), eigh(floor=False), pseudo_inverse()):
        assert relative_error(solver(A, p, 0.0).root, truth) < tolerance(17, 1e3, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("p", [1, 2.5, 4])
def test_pseudo_inverse_of_every_rank(p: float, rank: int, dtype: torch.dtype) -> None:
    Q, values = orthogonal(16), low_rank(16, rank)
    result = pseudo_inverse()(with_spectrum(Q, values, dtype), p, 0.0)
    truth = with_spectrum(Q, torch.where(values > 0, values ** (-1 / p), 0.0))
    assert result.converged.all()
    # Kept eigenvalues are within a factor of 2 of each other; their eigenspace is off by eps too.
    assert relative_error(result.root, truth) < tolerance(16, 2, 1, dtype)
    assert result.condition.max() < 2.01
    assert result.residual.max() < tolerance(16, 2, 1, dtype)


def test_pseudo_inverse_cuts_at_the_larger_tolerance() -> None:
    A = torch.diag(torch.tensor([8.0, 4.0, 1.0, 0.5]))
    kept = [
        pseudo_inverse(rtol=rtol, atol=atol)(A, 1, 0.0).root.diagonal().count_nonzero().item()
        for rtol, atol in ((0.0, 0.0), (0.25, 0.0), (0.0, 1.0), (0.25, 4.0), (0.0, 8.0))
    ]
    # An eigenvalue equal to the cut is dropped; with none kept the root is zero.
    assert kept == [4, 2, 2, 1, 0]


def test_float_epsilon_tensor_does_not_lower_the_precision() -> None:
    A = with_spectrum(orthogonal(5), log_spaced(5, 10))
    for name, solver in solvers(torch.float64).items():
        root = solver(A, 2, torch.tensor(0.5)).root
        assert root.dtype == torch.float64, name
        torch.testing.assert_close(root, solver(A, 2, 0.5).root, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_per_matrix(name: str) -> None:
    A = with_spectrum(orthogonal(5), log_spaced(5, 10))
    solver = solvers(torch.float64)[name]
    together = solver(A, 4, torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)).root
    for i, epsilon in enumerate((0.1, 0.2, 0.4)):
        torch.testing.assert_close(together[i], solver(A[i], 4, epsilon).root)


@pytest.mark.parametrize("make", [eigh, coupled_newton, newton_schulz])
@pytest.mark.parametrize("d", [1, 2, 8, 64, 128])
def test_relative_damping(make, d: int) -> None:  # type: ignore[no-untyped-def]
    """λmax is exact for eigh. Elsewhere it is an estimate, within 5 % without a gap at the top."""
    scale, relative = 7.0, 1e-2
    Q = orthogonal(d)
    values = torch.linspace(1, 0, d, dtype=torch.float64) * scale
    root = make(relative_epsilon=relative)(with_spectrum(Q, values), 4, 1e-3).root
    truth = with_spectrum(Q, (values + 1e-3 + relative * scale) ** -0.25)
    assert relative_error(root, truth) < (1e-12 if make is eigh else 0.05 / 4)


def test_repairs_of_an_indefinite_spectrum() -> None:
    """floor lifts the negative eigenvalue alone; the reference's shift lifts all by as much."""
    A = torch.diag(torch.tensor([-0.5, 1.0], dtype=torch.float64))
    floor, shift = eigh()(A, 1, 0.25), eigh(floor=False)(A, 1, 0.25)
    torch.testing.assert_close(floor.root.diagonal(), torch.tensor([4, 1 / 1.25]).double())
    torch.testing.assert_close(shift.root.diagonal(), torch.tensor([4, 1 / 1.75]).double())
    # The residual is that of A itself: (-0.5 + 0.25) / 0.25 - 1.
    torch.testing.assert_close(floor.residual.item(), 2.0, rtol=0.5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_residual_is_that_of_the_root(name: str, p: int, dtype: torch.dtype) -> None:
    """Within a factor of 3, or of the rounding of the products it is computed from."""
    epsilon = 1e-6
    for d in (1, 2, 17, 128):
        A = with_spectrum(orthogonal(d, 8), low_rank(d, max(1, d // 4)), dtype)
        result = solvers(dtype, 2e6)[name](A, p, epsilon)
        assert result.converged.all()
        identity = torch.eye(d, dtype=torch.float64)
        left, right = (
            torch.linalg.matrix_power(result.root.double(), q) for q in (p - p // 2, p // 2)
        )
        difference = left @ (A.double() + epsilon * identity) @ right - identity
        truth = torch.linalg.matrix_norm(difference, 2)
        rounding = torch.finfo(dtype).eps / epsilon
        assert (result.residual < 3 * truth + rounding).all()
        assert (truth < 3 * result.residual + rounding).all()


def test_residual_sees_a_root_that_is_wrong() -> None:
    """One that stops early: the estimate follows the truth, from below."""
    A = with_spectrum(orthogonal(32), log_spaced(32, 1e4))
    for iterations in (2, 5, 10, 12, 13, 14):
        solver = coupled_newton(
            relative_epsilon=0.0, max_iterations=iterations, retries=0, max_residual=float("inf")
        )
        X, residual = solver(A, 4, 0.0)[:2]
        difference = X @ X @ A @ X @ X - torch.eye(32, dtype=torch.float64)
        truth = torch.linalg.matrix_norm(difference, 2)
        assert (residual <= truth + 1e-11).all()
        assert (residual > truth / 1.5).all()
