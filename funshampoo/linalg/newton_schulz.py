"""Inverse roots by a fixed number of matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.linalg.estimates import largest_eigenvalue
from funshampoo.linalg.normalized import certify, normalize
from funshampoo.linalg.products import matmul, matrix_power, power
from funshampoo.linalg.solver import (
    InverseRoot,
    Number,
    RootSolver,
    add_to_diagonal,
    check_matrix,
    identity_like,
    integer_exponent,
    replace_nonfinite,
    symmetrize,
    total_damping,
    where,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class newton_schulz(RootSolver):
    """Inverse root by a fixed number of coupled Newton-Schulz steps, for integer p: no host reads.

    Square root and inverse square root together (Higham, Functions of Matrices, 2008, chapter 6),
    with Ã = A + damping·I and c = ‖Ã‖_∞ ≥ λmax:
        Y = Ã / c,   Z = I
        E = β I - γ Z Y,   Y ← Y E,   Z ← E Z     for each step's β, γ
        Ã^(1/2) = √c Y,   Ã^(-1/2) = Z / √c
    In exact arithmetic each step maps x = √(eigenvalue of Z Y) to βx - γx³. β and γ are the best
    ones for the interval that holds all x by then (Grishina, Smirnov and Rakhuba, arXiv
    2506.10935): 12 steps at the defaults and d = 128, where β = 3/2, γ = 1/2 take 24.

    For p = 2^a·m with m odd: a square roots, the last of which yields the inverse, or if m > 1 the
    inverse m-th root by as many steps of inverse Newton (`coupled_newton`) as it needs. p = 1 is
    the square of p = 2, and has its residual.

    The number of steps follows from condition, tolerance, p and d: it takes eigenvalues from λmax /
    condition up to within `tolerance` of their limit. So it compiles, batches, and differentiates
    to any order (gradients are right to a few times the tolerance). A root whose residual
    is above max_residual is never returned: `converged` is False. That is where a matrix with a
    larger condition number than promised ends. In float64, tolerance=1e-12 gives errors of 1e-10.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2]. λmax and the condition
    returned are estimates by power iterations.
    condition: the largest λmax / λmin of Ã to be prepared for, about 1 / relative_epsilon.
    max_residual: see `coupled_newton`.
    Raises ValueError for a negative number as relative_epsilon, epsilon or max_residual,
    condition < 1, tolerance < 1e-14, or when p is not a positive integer; TypeError for a dtype
    other than float32 and float64.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> newton_schulz(relative_epsilon=0.0)(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = {"relative_epsilon": 0, "condition": 1, "tolerance": 1e-14, "max_residual": 0}
    relative_cost = 7.0

    relative_epsilon: Number = 1e-6
    condition: float = 1e6
    tolerance: float = 1e-6
    max_residual: float = 0.5

    def __call__(self, A: Tensor, p: float, epsilon: Number = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        with full_precision():
            return self._solve(A, integer_exponent(p, "newton_schulz"), epsilon)

    def _solve(self, A: Tensor, p: int, epsilon: Number) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: largest_eigenvalue(A))
        system = normalize(add_to_diagonal(A, damping), finite)
        q = max(p, 2)
        X = _inverse_root(system.B, q, self.condition, self.tolerance)
        result = certify(X, q, system, self.max_residual)
        if p == 1:
            return result._replace(root=symmetrize(matmul(result.root, result.root)))
        return result


def _inverse_root(B: Tensor, p: int, condition: float, tolerance: float) -> Tensor:
    """B^(-1/p) for p > 1, finite whatever B's eigenvalues are."""
    while p % 2 == 0:
        B, X = _square_roots(B, condition, tolerance)
        p, condition = p // 2, math.sqrt(condition)
    return X if p == 1 else _odd_inverse_root(B, p, condition, tolerance)


def _square_roots(B: Tensor, condition: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """B^(1/2) and B^(-1/2)."""
    identity = identity_like(B)
    c = _row_sum_norm(B)
    Y, Z = B / c, identity.expand_as(B)
    for beta, gamma in _cubics(1 / math.sqrt(condition * _slack(B)), tolerance):
        P = matmul(Z, Y)
        E = beta * identity - gamma * P
        # Eigenvalues of P end up below 4, unless rounding has made one negative.
        bounded = _bounded(P, 16.0)
        Y, Z = where(bounded, matmul(Y, E), Y), where(bounded, matmul(E, Z), Z)
    return Y * c.sqrt(), Z / c.sqrt()


def _odd_inverse_root(B: Tensor, p: int, condition: float, tolerance: float) -> Tensor:
    """B^(-1/p) by inverse Newton: N = ((p + 1) I - M)/p, X ← X N, M ← N^p M."""
    identity = identity_like(B)
    z = (p + 1) / (2 * _row_sum_norm(B))
    X, M = power(z, 1 / p) * identity, z * B
    for _ in range(_newton_steps(p, condition * _slack(B), tolerance)):
        N = ((p + 1) * identity - M) / p
        bounded = _bounded(M, 8.0 * p)  # eigenvalues start below (p + 1)/2 and end below 1
        X = where(bounded, matmul(X, N), X)
        M = where(bounded, matmul(matrix_power(N, p), M), M)
    return X


def _row_sum_norm(B: Tensor) -> Tensor:
    """‖B‖_∞ (..., 1, 1). It bounds λmax; as the root does not depend on it, it has no gradient."""
    return B.detach().abs().sum(-1).amax(-1)[..., None, None]


def _slack(B: Tensor) -> float:
    """How far ‖B‖_∞ can be above λmax: √d."""
    return math.sqrt(B.shape[-1])


def _bounded(M: Tensor, limit: float) -> Tensor:
    """Which (...) iterates are still on course.

    The others are frozen: they would overflow, and 0·inf is NaN in the backward pass.
    """
    return M.detach().abs().amax((-2, -1)) < limit


def _cubics(lower: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """β, γ of the steps x ← βx - γx³ that bring all x in [lower, 1] within `tolerance` of 1.

    On [l, u] the best such cubic takes its smallest value, 1 - e, at both ends and its largest,
    1 + e, in between, at x² = (l² + lu + u²)/3. The next interval is [1 - e, 1 + e].
    """
    upper = 1.0
    while max(1 - lower, upper - 1) > tolerance:
        peak = math.sqrt((lower * lower + lower * upper + upper * upper) / 3)
        low, high = lower * upper * (lower + upper), 2 * peak**3
        gamma = 2 / (low + high)
        yield 3 * gamma * peak**2, gamma
        lower, upper = gamma * low, gamma * high


def _newton_steps(p: int, condition: float, tolerance: float) -> int:
    """Steps m ← m ((p + 1 - m)/p)^p that bring all m in [1/condition, 1]·(p + 1)/2 close to 1."""
    upper = (p + 1) / 2
    lower, steps = upper / condition, 0
    while max(1 - lower, upper - 1) > tolerance:
        # A step rises up to m = 1 and falls from there: largest at 1, smallest at an end.
        lower = min(m * ((p + 1 - m) / p) ** p for m in (lower, upper))
        upper, steps = 1.0, steps + 1
    return steps
