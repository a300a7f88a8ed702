"""Old eigenbases, used again: against the equations in float64, and where they stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from funshampoo import linalg
from funshampoo.linalg import adaptive
from funshampoo.linalg.adaptive import spectrum_near
from tests.linalg.spectra import log_spaced, orthogonal, with_spectrum

SOLVERS = {
    "eigh": linalg.eigh(relative_epsilon=1e-3),
    "eigh-shift": linalg.eigh(relative_epsilon=1e-3, floor=False),
    "pseudo_inverse": linalg.pseudo_inverse(rtol=1e-2),
}


def turned(size: float, d: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Matrices and bases that diagonalize them but for a rotation by about `size` (per row)."""
    Q = orthogonal(d, 4)
    A = with_spectrum(Q, log_spaced(d, 100.0))
    noise = torch.randn(4, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sizes = size * torch.tensor([0.0, 0.01, 1.0, 3.0], dtype=torch.float64)
    skew = (noise - noise.mT) * sizes[:, None, None]
    return A.to(dtype), (Q @ torch.linalg.matrix_exp(skew)).to(dtype)


def plain(A: Tensor, Q: Tensor, tolerance: float, solver: str, p: float) -> tuple[Tensor, bool]:
    """One matrix by the equations, entry by entry."""
    d = A.shape[0]
    B = Q.T @ A @ Q
    off = sum(float(B[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) ** 0.5
    keeps = off <= tolerance * float((A**2).sum()) ** 0.5
    if not keeps:
        values, Q = torch.linalg.eigh(A)
    else:
        values = B.diagonal()
    if solver == "pseudo_inverse":
        f = torch.where(values > 1e-2 * values.max(), values ** (-1 / p), 0.0)
    else:
        repaired = values.clamp(min=0) if solver == "eigh" else values - min(0, values.min())
        f = (repaired + 1e-3 * values.max()) ** (-1 / p)
    return Q @ f.diag() @ Q.T, keeps


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.2, 0.5])
def test_against_the_equations(solver: str, tolerance: float) -> None:
    A, Q = turned(0.02)
    found, basis = SOLVERS[solver].near_basis(A, 4, 0.0, Q, tolerance)  # type: ignore[attr-defined]
    verdicts = []
    for i in range(4):
        expected, keeps = plain(A[i], Q[i], tolerance, solver, 4)
        assert torch.allclose(found.root[i], expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(basis[i], Q[i]) == keeps
        verdicts.append(keeps)
    count = {0.0: 0, 1e-3: 2, 0.2: 3, 0.5: 4}[tolerance]  # so that each case is there
    assert sum(verdicts) == count
    assert found.converged.all()


def test_2_small_off_diagonals_are_seen_in_float32() -> None:
    """Measured elsewhere: as a difference of norms, off-diagonals from 1e-6 to 1e-3 all read 0."""
    d = 64
    A = log_spaced(d, 10.0).diag().float()
    for size in (1e-5, 1e-4, 1e-3):
        A[0, 1] = A[1, 0] = size
        norm = float(A.norm())
        expected = 2**0.5 * size / norm
        for tolerance, keeps in ((1.01 * expected, True), (0.99 * expected, False)):
            basis = spectrum_near(A, torch.eye(d), tolerance).vectors
            assert torch.equal(basis, torch.eye(d)) == keeps
        difference = A.norm() ** 2 - A.diagonal().norm() ** 2  # the mistake
        if size <= 1e-4:
            assert abs(float(difference.clamp(min=0).sqrt()) / norm / expected - 1) > 0.5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_verdict_does_not_depend_on_the_scale(scale: float) -> None:
    """Squares in a norm would underflow to "diagonal", or overflow to it."""
    A, Q = turned(0.02, dtype=torch.float32)
    basis = spectrum_near(A * scale, Q, 0.2).vectors
    assert [torch.equal(a, b) for a, b in zip(basis, Q)] == [True, True, True, False]


def test_only_those_that_need_it_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    A, Q = turned(0.02)
    decomposed: list[int] = []
    original = adaptive.decompose
    monkeypatch.setattr(
        adaptive, "decompose", lambda x: (decomposed.append(len(x)), original(x))[1]
    )
    for tolerance in (0.0, 1e-3, 0.2, 0.5):
        spectrum_near(A, Q, tolerance)
    assert decomposed == [4, 2, 1]


def test_under_vmap_as_without() -> None:
    A, Q = turned(0.02)
    expected = spectrum_near(A, Q, 1e-3)
    found = vmap(lambda a, q: spectrum_near(a, q, 1e-3))(A, Q)
    for a, b in zip(found, expected):
        assert torch.allclose(a.double(), b.double(), atol=1e-12)


@pytest.mark.parametrize("d", [5, 12, 41])
def test_a_row_does_not_depend_on_its_neighbours(d: int) -> None:
    """Nor on whether any of them is decomposed, nor on the layout that the bases come in."""
    A, Q = turned(0.02, d, torch.float32)
    solver: Any = SOLVERS["eigh"]
    for tolerance in (0.0, 0.2, 0.5):
        root, basis = solver.near_basis(A, 4, 0.0, Q, tolerance)
        for i in range(4):
            for own in (Q[i : i + 1], Q[i : i + 1].mT.contiguous().mT):
                alone, kept = solver.near_basis(A[i : i + 1], 4, 0.0, own, tolerance)
                assert all([torch.equal(a[0], b[i]) for a, b in zip(alone, root)])
                assert torch.equal(kept[0], basis[i])


def test_what_is_not_finite_or_zero() -> None:
    A, Q = turned(0.02)
    A = torch.stack([A[0], torch.full_like(A[0], torch.nan), torch.zeros_like(A[0])])
    found, _ = SOLVERS["eigh"].near_basis(A, 4, 0.0, Q[:3], 1e-3)  # type: ignore[attr-defined]
    assert found.converged.tolist() == [True, False, False]


def test_gradients_are_those_of_what_is_computed() -> None:
    """In a kept basis through its eigenvalues and itself, elsewhere of the root: by differences."""
    A, Q = turned(0.05)
    solver: Any = SOLVERS["eigh"]
    kept = solver.near_basis(A, 4, 0.0, Q, 0.04)[1] == Q
    assert kept.flatten(1).all(-1).unique().tolist() == [False, True], "some of both"
    weights = torch.arange(A.numel(), dtype=A.dtype).reshape(A.shape) / A.numel()
    make = torch.Generator().manual_seed(5)
    dA, dQ = (torch.randn(A.shape, generator=make, dtype=A.dtype) for _ in range(2))
    dA = dA + dA.mT

    def scalar(t: Tensor) -> Tensor:
        found, basis = solver.near_basis(A + t * dA, 4, 0.0, Q + t * dQ, 0.04)
        total: Tensor = ((found.root + basis.square()) * weights).sum()  # a column has no sign
        return total

    zero, h = torch.zeros((), dtype=A.dtype), 1e-6
    expected = (scalar(zero + h) - scalar(zero - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(scalar)(zero), expected, rtol=1e-6, atol=0)


def test_solvers_with_equal_numbers_are_equal() -> None:
    epsilon = torch.tensor(1e-3)
    assert linalg.eigh() == linalg.eigh()
    assert hash(linalg.eigh()) == hash(linalg.eigh())
    assert linalg.eigh(floor=False) != linalg.eigh()
    assert linalg.eigh() != linalg.pseudo_inverse()
    assert linalg.eigh(relative_epsilon=epsilon) == linalg.eigh(relative_epsilon=epsilon)
    assert linalg.eigh(relative_epsilon=epsilon) != linalg.eigh(relative_epsilon=epsilon.clone())
