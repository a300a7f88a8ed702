"""Inverse roots by a fixed number of matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funshampoo.core.context import changed
from funshampoo.core.contract import Hyper
from funshampoo.core.modes import full_precision, is_differentiated
from funshampoo.linalg.estimates import largest_eigenvalue
from funshampoo.linalg.normalized import certify, normalize
from funshampoo.linalg.products import matmul, matrix_power, power
from funshampoo.linalg.root_steps import Step, square_root_steps
from funshampoo.linalg.solver import (
    InverseRoot,
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

_LARGEST = 2.0
"""Entries of Z Y end up below that: its eigenvalues are below 1.07, unless one is negative."""


@dataclass(frozen=True, eq=False, kw_only=True)
class newton_schulz(RootSolver):
    """Inverse root by a fixed number of coupled Newton-Schulz steps, for integer p: no host reads.

    Square root and inverse square root together (Higham, Functions of Matrices, 2008, chapter 6),
    with Ã = A + damping·I and c = ‖Ã‖_∞ ≥ λmax:
        Y = Ã / c,   Z = I
        E = e(Z Y),   Y ← Y E,   Z ← E Z     for each step's polynomial e
        Ã^(1/2) = √c Y,   Ã^(-1/2) = Z / √c
    In exact arithmetic each step maps x = √(eigenvalue of Z Y) to x e(x²). Up to 4096 a side there
    are four polynomials of degree 4 (of 9 in x) by which the least x grows sevenfold, one that is
    the best for the interval that then holds them all, and the binomial series of (Z Y)^(-1/2): 27
    products at the defaults, and 17 for the second of two roots, whose range is the root of the
    first's. The best odd polynomials of an interval are those of the matrix sign (Amsel et al.,
    arXiv 2505.16932; Grishina et al., arXiv 2506.10935).

    Products are whole ones, though the matrices are symmetric but for rounding: half of each,
    mirrored, would be 0.6 of the work, and loses the coupling that keeps the iteration stable. In
    float32 and at a condition of 1e6 such roots, of 64 to 512 a side, were all wrong.

    For p = 2^a·m with m odd: a square roots, the last of which yields the inverse, or if m > 1 the
    inverse m-th root by as many steps of inverse Newton (`coupled_newton`) as it needs. p = 1 is
    the square of p = 2, and has its residual.

    The number of steps follows from condition, tolerance, p and d: it takes eigenvalues from λmax /
    condition up to within `tolerance` of their limit. So it compiles, batches, and differentiates
    to any order: of a matrix that requires gradients the tolerance is squared, since a polynomial
    that is close need not rise alike. A root whose residual is above max_residual is never
    returned: `converged` is False. That is where a matrix with a larger condition number than
    promised ends. In float64, tolerance=1e-12 gives errors of 1e-10.

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

    relative_epsilon: Hyper = 1e-6
    condition: float = 1e6
    tolerance: float = 1e-6
    max_residual: float = 0.5

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        with full_precision():
            return self._solve(A, integer_exponent(p, "newton_schulz"), epsilon)

    def _solve(self, A: Tensor, p: int, epsilon: Hyper) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: largest_eigenvalue(A))
        system = normalize(add_to_diagonal(A, damping), finite)
        q = max(p, 2)
        # A polynomial that is close need not rise alike: its derivative takes a step more.
        tolerance = max(self.tolerance**2, 1e-14) if is_differentiated(A) else self.tolerance
        X = _inverse_root(system.B, q, self.condition, tolerance)
        result = certify(X, q, system, self.max_residual)
        if p == 1:
            return changed(result, root=symmetrize(matmul(result.root, result.root)))
        return result


def _inverse_root(B: Tensor, p: int, condition: float, tolerance: float) -> Tensor:
    """B^(-1/p) for p > 1, finite whatever B's eigenvalues are."""
    scale = _row_sum_norm(B)
    Y, lower, m = B / scale, 1 / (condition * math.sqrt(B.shape[-1])), p
    while m % 2 == 0:
        lower, m = math.sqrt(lower), m // 2
        Y = _square_root(Y, lower, tolerance, inverse=m == 1)
    if m > 1:
        Y = _odd_inverse_root(Y, m, lower, tolerance)
    return Y * power(scale, -1 / p)


def _square_root(Y: Tensor, lower: float, tolerance: float, inverse: bool) -> Tensor:
    """Y^(1/2), or Y^(-1/2), of eigenvalues in [lower², 1]."""
    identity = identity_like(Y)
    Z = None
    left = square_root_steps(lower, tolerance)
    while left:
        step, *left = left
        P = Y if Z is None else matmul(Z, Y)
        E = where(_bounded(P, _LARGEST), _polynomial(step, P, identity), identity)
        if left or not inverse:
            Y = matmul(Y, E)
        if left or inverse:
            Z = E if Z is None else matmul(E, Z)
    if not inverse:
        return Y
    return identity.expand_as(Y) if Z is None else Z


def _polynomial(step: Step, P: Tensor, identity: Tensor) -> Tensor:
    """a I + b M + c M² + d M³ + e M⁴ with M = P, or I - P; by one product up to c, else by two."""
    M = identity - P if step.around_one else P
    a, b, *rest = step.coefficients
    E = a * identity + b * M
    if not rest:
        return E
    square = matmul(M, M)
    if len(rest) == 1:
        return E + rest[0] * square
    c, d, e = rest
    return E + matmul(square, c * identity + d * M + e * square)


def _odd_inverse_root(Y: Tensor, p: int, lower: float, tolerance: float) -> Tensor:
    """Y^(-1/p) by inverse Newton: N = ((p + 1) I - M)/p, X ← X N, M ← N^p M."""
    identity = identity_like(Y)
    z = (p + 1) / 2
    X: Tensor = z ** (1 / p) * identity.expand_as(Y)
    M = z * Y
    for _ in range(_newton_steps(p, 1 / lower, tolerance)):
        N = ((p + 1) * identity - M) / p
        bounded = _bounded(M, 8.0 * p)  # eigenvalues start below (p + 1)/2 and end below 1
        X = where(bounded, matmul(X, N), X)
        M = where(bounded, matmul(matrix_power(N, p), M), M)
    return X


def _row_sum_norm(B: Tensor) -> Tensor:
    """‖B‖_∞ (..., 1, 1): λmax at least, and √d of it at most.

    As the root does not depend on it, it has no gradient.
    """
    return B.detach().abs().sum(-1).amax(-1)[..., None, None]


def _bounded(M: Tensor, limit: float) -> Tensor:
    """Which (...) iterates are still on course.

    The others are frozen: they would overflow, and 0·inf is NaN in the backward pass.
    """
    largest: Tensor = torch.linalg.vector_norm(M.detach(), math.inf, dim=(-2, -1))
    return largest < limit


def _newton_steps(p: int, condition: float, tolerance: float) -> int:
    """Steps m ← m ((p + 1 - m)/p)^p that bring all m in [1/condition, 1]·(p + 1)/2 close to 1."""
    upper = (p + 1) / 2
    lower, steps = upper / condition, 0
    while max(1 - lower, upper - 1) > tolerance:
        # A step rises up to m = 1 and falls from there: largest at 1, smallest at an end.
        lower = min(m * ((p + 1 - m) / p) ** p for m in (lower, upper))
        upper, steps = 1.0, steps + 1
    return steps
