"""QR by products: orthonormal whatever comes in, and Householder's columns but for their signs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from funshampoo.linalg.basis import power_step
from funshampoo.linalg.cholesky_qr import cholesky_qr

DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64)


def basis(d: int, seed: int = 0) -> Tensor:
    found: Tensor = torch.linalg.qr(randn(d, d, seed=seed))[0]
    return found


def spectrum(d: int, condition: float, rank: int) -> Tensor:
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    return torch.where(torch.arange(d) < rank, values, 0.0)


def statistics(d: int, condition: float, rank: int, U: Tensor) -> Tensor:
    return (U * spectrum(d, condition, rank)) @ U.mT


def error_of(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def largest_first(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    order = (A @ Q * Q).sum(-2).argsort(descending=True)
    return (A @ Q)[:, order], Q[:, order]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("rank", [96, 48, 3])
@pytest.mark.parametrize("condition", [1e1, 1e5, 1e10])
def test_it_is_orthonormal_and_begins_as_householder_s(
    condition: float, rank: int, near: bool, dtype: torch.dtype
) -> None:
    """Columns of large eigenvalues are compared; those of nothing are anybody's."""
    d, epsilon = 96, torch.finfo(dtype).eps
    U = basis(d)
    A = statistics(d, condition, rank, U)
    old = torch.linalg.qr(U + 0.02 / d**0.5 * randn(d, d, seed=1))[0] if near else basis(d, 2)
    Y, S = largest_first(A.to(dtype), old.to(dtype))
    Q = cholesky_qr(Y, S)
    assert error_of(Q) < 20 * epsilon
    expected = torch.linalg.qr(Y.double())[0]
    count = int((spectrum(d, condition, rank) > 1e-3).sum()) if near else 3
    cosines = (Q.double() * expected).sum(-2).abs()[:count]
    assert (1 - cosines).max() < 1e5 * epsilon


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_that_lacks_columns_is_completed(dtype: torch.dtype) -> None:
    """Those of coordinates that no gradient had touched are zeros, until one does."""
    d = 24
    A = statistics(d, 1e2, d, basis(d)).to(dtype)
    old = torch.zeros(d, d, dtype=dtype)
    old[: d - 5, : d - 5] = basis(d - 5, 3).to(dtype)
    assert error_of(cholesky_qr(*largest_first(A, old))) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [64, 20])
@pytest.mark.parametrize("dead", [[63], [0, 1, 2, 3, 4, 5, 6, 7], [3, 17, 40], list(range(40))])
def test_coordinates_that_no_gradient_touches(
    dead: list[int], rank: int, dtype: torch.dtype
) -> None:
    """Their rows are zeros again after each step, as `in_eigenbasis` has it: the others go on."""
    d = 64
    live = torch.ones(d, dtype=dtype)
    live[dead] = 0
    G = randn(d, rank).to(dtype) * live[:, None]
    A = G @ G.mT / rank
    Q = torch.linalg.eigh(A)[1] * live[:, None]
    for t in range(8):
        order = (A @ Q * Q).sum(-2).argsort(descending=True)
        drift = randn(d, rank, seed=t).to(dtype) * live[:, None]
        A = 0.9 * A + 0.1 * drift @ drift.mT / rank
        Q = cholesky_qr((A @ Q)[:, order], Q[:, order]) * live[:, None]
        assert (Q @ Q.mT - live.diag()).abs().max() < 100 * torch.finfo(dtype).eps


def test_zeros_and_what_is_not_finite() -> None:
    Q = basis(5)
    assert torch.allclose(cholesky_qr(torch.zeros(5, 5).double(), Q), Q, atol=1e-12)
    Y = randn(3, 5, 5)
    Y[1, 2, 2] = torch.nan
    found = cholesky_qr(Y, torch.eye(5).double().expand(3, 5, 5)).isfinite().all(-1).all(-1)
    assert found.tolist() == [True, False, True]


def test_stacks_vmap_and_scale() -> None:
    Y, S = randn(4, 7, 7), torch.eye(7).double()
    one_by_one = torch.stack([cholesky_qr(y, S) for y in Y])
    assert torch.allclose(cholesky_qr(Y, S.expand(4, 7, 7)), one_by_one, atol=1e-12)
    assert torch.allclose(vmap(cholesky_qr, (0, None))(Y, S), one_by_one, atol=1e-12)
    assert torch.allclose(cholesky_qr(1e200 * Y, S), one_by_one, atol=1e-12)


def test_power_steps_by_it_find_the_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do with reflections: the same columns up to signs after many steps."""
    A = statistics(12, 1e3, 12, basis(12))
    U, Q, R = torch.linalg.eigh(A)[1], basis(12, 5), basis(12, 5)
    for _ in range(100):
        Q = power_step(A, Q)
    monkeypatch.setattr("funshampoo.linalg.basis.orthogonal", cholesky_qr)
    for _ in range(100):
        R = power_step(A, R)
    assert torch.allclose((U.mT @ R).abs(), (U.mT @ Q).abs(), atol=1e-6)
    assert torch.allclose((U.mT @ R).abs().amax(-1), torch.ones(12).double(), atol=1e-6)
