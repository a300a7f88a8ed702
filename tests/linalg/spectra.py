"""Matrices with known spectra, and so the float64 truth about their roots."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funshampoo.linalg import Solver, coupled_newton, eigh, newton_schulz


def orthogonal(d: int, count: int = 3, seed: int = 0) -> Tensor:
    """(count, d, d) random orthogonal matrices."""
    generator = torch.Generator().manual_seed(seed)
    Q: Tensor = torch.linalg.qr(torch.randn(count, d, d, dtype=torch.float64, generator=generator))[
        0
    ]
    return Q


def with_spectrum(Q: Tensor, values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Q diag(values) Qᵀ, exactly symmetric."""
    A = (Q * values[..., None, :]) @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


def log_spaced(d: int, condition: float) -> Tensor:
    """(d,) eigenvalues from 1 down to 1 / condition."""
    exponents = torch.linspace(0, 1, d, dtype=torch.float64)
    return torch.tensor(1 / condition, dtype=torch.float64) ** exponents


def low_rank(d: int, rank: int) -> Tensor:
    """(d,) eigenvalues: `rank` between 1 and 1/2, then zeros."""
    values = torch.zeros(d, dtype=torch.float64)
    values[:rank] = torch.linspace(1, 0.5, rank, dtype=torch.float64)
    return values


def relative_error(X: Tensor, truth: Tensor) -> float:
    """The largest ‖X - truth‖₂ / ‖truth‖₂ of the stack."""
    error = torch.linalg.matrix_norm(X.double() - truth, 2) / torch.linalg.matrix_norm(truth, 2)
    return float(error.max())


def tolerance(d: int, condition: float, p: float, dtype: torch.dtype) -> float:
    """What the relative error of a root may be.

    Rounding A to its dtype, adding the damping and any backward stable computation move A by a few
    √d·eps·λmax. That moves the smallest eigenvalue by condition times as much relative to itself,
    and its root, the largest of X, by 1/p of that. Rounding in X itself adds a few √d·eps, and the
    iterations stop within a tolerance.
    """
    eps: float = torch.finfo(dtype).eps
    return 8 * math.sqrt(d) * eps * (condition / p + 8) + STOP[dtype]


STOP = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Tolerances for the iterative solvers."""


def solvers(dtype: torch.dtype, condition: float = 1e6) -> dict[str, Solver]:
    """Every solver that damps, without relative damping, as exact as it gets."""
    return {
        "eigh": eigh(),
        "eigh-shift": eigh(floor=False),
        "coupled_newton": coupled_newton(relative_epsilon=0.0, tolerance=STOP[dtype], retries=0),
        "newton_schulz": newton_schulz(
            relative_epsilon=0.0, tolerance=STOP[dtype], condition=condition
        ),
    }


NAMES = list(solvers(torch.float32))
DTYPES = [torch.float32, torch.float64]
