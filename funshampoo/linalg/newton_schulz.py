"""Inverse roots by a fixed number of matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .estimates import largest_eigenvalue
from .normalized import certify, normalize
from .solver import (
    InverseRoot,
    Solver,
    add_to_diagonal,
    check_at_least,
    check_matrix,
    identity_like,
    integer_exponent,
    replace_nonfinite,
    symmetrize,
    total_damping,
    where,
)

BOUND = 16.0
"""Largest entry that Z Y and M may have: their eigenvalues stay below 4 and (p+1)/2 unless rounding made one negative."""


def newton_schulz(
    *,
    relative_epsilon: float | Tensor = 1e-6,
    condition: float = 1e6,
    tolerance: float = 1e-6,
    max_residual: float = 0.25,
) -> Solver:
    """Inverse root by coupled Newton-Schulz iterations of fixed length, for integer p: products only, no host reads.

    With c = ‖A‖_∞ ≥ λmax, square root and inverse square root together (Higham, Functions of Matrices, 2008, ch. 6):
        Y = A / c,   Z = I;   repeat:   E = β I - γ Z Y,   Y ← Y E,   Z ← E Z;   A^(1/2) ≈ √c Y,   A^(-1/2) ≈ Z / √c
    with β, γ the cubic that is best on the interval where the eigenvalues of √(Z Y) are known to lie by then (the
    closed form of Grishina, Smirnov and Rakhuba, arXiv 2506.10935), which takes 13 steps where β = 3/2, γ = 1/2 take
    20. For p = 2^a·m, m odd: a square roots, the last of which yields the inverse, or for m > 1 the inverse m-th root
    by coupled inverse Newton (see `coupled_newton`). p = 1 is the square of p = 2.

    The number of steps follows from `condition`, `tolerance`, p and d alone: it is what eigenvalues from λmax /
    condition up take to come within `tolerance` of their roots in exact arithmetic. So it compiles, batches and
    differentiates (to any order). Where the residual of the result is above max_residual, `converged` is False; a
    larger condition number than promised ends there. In float64, tolerance=1e-12 gives about 1e-10 at condition 1e6.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2]. λmax is an estimate by power iterations.
    condition: the largest λmax / λmin of A + damping·I to be prepared for; about 1 / relative_epsilon.
    Raises ValueError for a negative number as relative_epsilon, epsilon or max_residual, condition < 1,
    tolerance < 1e-14, or when p is not a positive integer; TypeError for a dtype other than float32 and float64.

    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> newton_schulz(relative_epsilon=0.0)(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_at_least("relative_epsilon", relative_epsilon, 0)
    check_at_least("condition", condition, 1)
    check_at_least("tolerance", tolerance, 1e-14)
    check_at_least("max_residual", max_residual, 0)

    def solve(A: Tensor, p: float, epsilon: float | Tensor = 0.0) -> InverseRoot:
        check_matrix(A)
        p = integer_exponent(p, "newton_schulz")
        A, finite = replace_nonfinite(A)
        damping = total_damping(A, epsilon, relative_epsilon, lambda: largest_eigenvalue(A))
        system = normalize(add_to_diagonal(A, damping), finite)
        if p > 1:
            return certify(_inverse_root(system.B, p, condition, tolerance), p, system, max_residual)
        result = certify(_inverse_root(system.B, 2, condition, tolerance), 2, system, max_residual)
        return result._replace(root=symmetrize(result.root @ result.root))

    return solve


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
        P = Z @ Y
        E = beta * identity - gamma * P
        bounded = _bounded(P)
        Y, Z = where(bounded, Y @ E, Y), where(bounded, E @ Z, Z)
    return Y * c.sqrt(), Z / c.sqrt()


def _odd_inverse_root(B: Tensor, p: int, condition: float, tolerance: float) -> Tensor:
    """B^(-1/p) by N = ((p + 1) I - M)/p, X ← X N, M ← N^p M from X = z^(1/p) I, M = z B, z = (p + 1) / (2c)."""
    identity = identity_like(B)
    z = (p + 1) / (2 * _row_sum_norm(B))
    X, M = z ** (1 / p) * identity, z * B
    for _ in range(_newton_steps(p, condition * _slack(B), tolerance)):
        N = ((p + 1) * identity - M) / p
        bounded = _bounded(M)
        X, M = where(bounded, X @ N, X), where(bounded, torch.linalg.matrix_power(N, p) @ M, M)
    return X


def _row_sum_norm(B: Tensor) -> Tensor:
    """‖B‖_∞ (..., 1, 1), which bounds λmax; what is computed does not depend on it, so a constant to autograd."""
    return B.detach().abs().sum(-1).amax(-1)[..., None, None]


def _slack(B: Tensor) -> float:
    """How far ‖B‖_∞ can be above λmax: √d."""
    return math.sqrt(B.shape[-1])


def _bounded(M: Tensor) -> Tensor:
    """Which (...) iterates are still on course. The others are frozen: a divergence would overflow, and 0·inf in the
    backward pass would turn gradients into NaN."""
    return M.detach().abs().amax((-2, -1)) < BOUND


def _cubics(lower: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """β, γ of each step x ← βx - γx³ until x, anywhere in [lower, 1] at first, is within `tolerance` of 1.

    On [l, u] the best such cubic takes its smallest value 1 - e at both ends and its largest, 1 + e, in between, at
    x² = (l² + lu + u²)/3; the next interval is [1 - e, 1 + e].
    """
    upper = 1.0
    while max(1 - lower, upper - 1) > tolerance:
        peak = math.sqrt((lower * lower + lower * upper + upper * upper) / 3)
        low, high = lower * upper * (lower + upper), 2 * peak**3
        gamma = 2 / (low + high)
        yield 3 * gamma * peak**2, gamma
        lower, upper = gamma * low, gamma * high


def _newton_steps(p: int, condition: float, tolerance: float) -> int:
    """Steps of m ← m ((p + 1 - m)/p)^p until m, anywhere in [1/condition, 1]·(p + 1)/2 at first, is near 1."""
    upper = (p + 1) / 2
    lower, steps = upper / condition, 0
    while max(1 - lower, upper - 1) > tolerance:
        # It rises up to m = 1 and falls from there: the largest value is at 1, the smallest at an end.
        lower = min(m * ((p + 1 - m) / p) ** p for m in (lower, upper))
        upper, steps = 1.0, steps + 1
    return steps
