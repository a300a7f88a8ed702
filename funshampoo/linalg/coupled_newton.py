"""Inverse roots by coupled iterations, run to convergence: Newton, and higher orders."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import all_true, full_precision
from funshampoo.core.tree import cast
from funshampoo.linalg.estimates import largest_eigenvalue
from funshampoo.linalg.normalized import Normalized, certify, normalize
from funshampoo.linalg.products import matmul, matrix_power, power
from funshampoo.linalg.root_steps import series
from funshampoo.linalg.solver import (
    InverseRoot,
    RootSolver,
    add_to_diagonal,
    check_exponent,
    check_matrix,
    identity_like,
    integer_exponent,
    replace_nonfinite,
    total_damping,
    where,
)

GROWTH = 1.2
"""An error this many times the last one means divergence, or rounding with nothing left to gain.

Checked after the first step, which brings all eigenvalues of M into (0, 1], where max|M - I| only
decreases. Before, it may rise: about 1 in 20 nearly singular matrices of side 2 to 5 would be lost.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class coupled_newton(RootSolver):
    """Inverse root by the coupled inverse Newton iteration (Guo and Higham, 2006), for integer p.

        Ã = A + damping·I,   z = (p + 1) / (2‖Ã‖_F),   X = z^(1/p) I,   M = z Ã
        while max|M - I| > tolerance:   N = ((p + 1) I - M) / p,   X ← X N,   M ← N^p M

    It uses products only, no eigendecomposition. Each matrix stops on its own: at the tolerance or,
    from the second step on, at the last iterate before the error max|M - I| grew to 1.2 times its
    last value. A root whose residual is then above max_residual is never returned: that matrix is
    solved again with ten times the damping, at least d·(machine epsilon)·λmax, up to `retries`
    times; if that fails, `converged` is False. After a successful retry, root, residual and
    condition are those for the raised damping.

    max_residual: an unconverged eigenvalue leaves about 1; rounding in float32 at the default
    damping leaves 0.05 to 0.2 for d up to 1024.

    λmax, for relative damping and retries, is estimated by power iterations, and so is `condition`.
    Every iteration has a host read, to see whether all are done; under torch.compile, where that is
    impossible, all max_iterations are run (`newton_schulz` suits it better). Differentiable through
    the iterates, to any order; gradients are accurate to about the tolerance.

    "A Schur-Newton method for the matrix pth root and its inverse", SIAM J. Matrix Anal. Appl.
    28(3); damping and retries as in Anil et al., arXiv 2002.09018.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2].
    Raises ValueError for a negative number as relative_epsilon, epsilon, max_iterations, tolerance,
    retries or max_residual, or when p is not a positive integer; TypeError for a dtype other than
    float32 and float64.

    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> coupled_newton(relative_epsilon=0.0)(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = dict.fromkeys(
        ("relative_epsilon", "max_iterations", "tolerance", "retries", "max_residual"), 0
    )
    relative_cost = 9.0

    relative_epsilon: Hyper = 1e-6
    max_iterations: int = 100
    tolerance: float = 1e-6
    retries: int = 3
    max_residual: float = 0.5

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        with full_precision():
            return self._solve(A, integer_exponent(p, "coupled_newton"), epsilon)

    def _solve(self, A: Tensor, p: int, epsilon: Hyper) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        largest = largest_eigenvalue(A)
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: largest)
        result = self._attempt(A, largest, damping, p, finite)
        for _ in range(self.retries):
            settled = result.converged | result.residual.isinf()  # inf: there was nothing to solve
            if all_true(settled):
                break
            least = A.shape[-1] * torch.finfo(A.dtype).eps * largest
            damping = torch.maximum(10 * damping, least)
            retried = self._attempt(A, largest, damping, p, ~settled)
            (first, *numbers), (second, *others) = result, retried  # no [1:]: see `changed`
            chosen = [torch.where(settled, a, b) for a, b in zip(numbers, others, strict=True)]
            result = InverseRoot(where(settled, first, second), *chosen)
        return result

    def _attempt(
        self, A: Tensor, largest: Tensor, damping: Tensor, p: int, wanted: Tensor
    ) -> InverseRoot:
        system = normalize(add_to_diagonal(A, damping), wanted)
        # The starting point does not affect the limit: a constant to autograd.
        z: Tensor = (p + 1) / (2 * torch.linalg.matrix_norm(system.B.detach()))
        X = iterate(system, z, p, self.max_iterations, self.tolerance)
        return certify(X, p, system, largest + damping, self.max_residual)


@dataclass(frozen=True, eq=False, kw_only=True)
class coupled_higher_order(RootSolver):
    """Inverse root by coupled iterations of order 2 (Newton), 3, ..., for rational p = m/q.

        ridge = max(relative_epsilon ‖A‖_∞, absolute_epsilon),   Ã = A + ridge·I
        X = z^(1/m) I,   M = z Ã,   z = 1 / tr Ã
        while max|M - I| > tolerance:   X ← X N,   M ← N^m M
        N = b_0 I + b_1 (I - M) + ... + b_{order-1} (I - M)^{order-1},  the series of M^(-1/m)

    The root is X^q. A step takes more products than Newton's and gains more digits. The ridge
    replaces the epsilon that the solver is called with, which has no effect, as in the Distributed
    Shampoo reference, for whose users this exists. Stopping, verdict and gradients are as in
    `coupled_newton`, without retries.

    Raises ValueError for a negative number, order < 2, or p ≤ 0; TypeError for a dtype other than
    float32 and float64. Shi et al., arXiv 2309.06497, for its use in Shampoo.

    >>> A = torch.diag(torch.tensor([1.0, 32.0]))
    >>> coupled_higher_order(relative_epsilon=0.0)(A, 5 / 2, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.2500]])
    """

    least: ClassVar = {"order": 2} | dict.fromkeys(
        ("relative_epsilon", "absolute_epsilon", "max_iterations", "tolerance", "max_residual"), 0
    )
    relative_cost = 60.0

    relative_epsilon: float = 1e-6
    absolute_epsilon: float = 0.0
    max_iterations: int = 100
    tolerance: float = 1e-8
    order: int = 3
    max_residual: float = 0.5

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        check_exponent(p)
        with full_precision():
            return self._solve(A, Fraction(p).limit_denominator(100))

    def _solve(self, A: Tensor, root: Fraction) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        largest_row_sum = A.abs().sum(-1).amax(-1)
        ridge = torch.clamp(self.relative_epsilon * largest_row_sum, min=self.absolute_epsilon)
        ridge = cast(ridge, A.dtype)
        system = normalize(add_to_diagonal(A, ridge), finite)
        z = 1 / system.B.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        X = iterate(system, z, root.numerator, self.max_iterations, self.tolerance, self.order)
        largest = largest_eigenvalue(A) + ridge
        p, q = root.as_integer_ratio()
        return certify(X, p, system, largest, self.max_residual, power_of_root=q)


def iterate(
    system: Normalized, z: Tensor, p: int, max_iterations: int, tolerance: float, order: int = 2
) -> Tensor:
    """X (..., d, d), the last accepted iterate for B^(-1/p) of each matrix of the stack.

    Starts from X = z^(1/p) I. The first step is Newton's, of order 2; the others have `order`.
    """
    B = system.B
    identity = identity_like(B)
    X = power(z, 1 / p)[..., None, None] * identity
    M = z[..., None, None] * B
    error = _distance(M, identity)
    active = system.solvable & (error > tolerance)
    for step in range(max_iterations):
        if all_true(~active):
            break
        N = _step(M, identity, p, order if step > 0 else 2)
        next_X, next_M = matmul(X, N), matmul(matrix_power(N, p), M)
        next_error = _distance(next_M, identity)
        # Finished matrices run along unchanged: none depends on its neighbours in the stack.
        if step > 0:
            active = active & (next_error < GROWTH * error)
        X, M = where(active, next_X, X), where(active, next_M, M)
        error = torch.where(active, next_error, error)
        active = active & (error > tolerance)
    # One more step, only for the gradient, which lags a step behind the value: otherwise a matrix
    # that starts converged, such as the identity for some p and d, would have none.
    next_X = matmul(X, _step(M, identity, p, 2))
    value: Tensor = X.detach()
    return value + (next_X - next_X.detach())


def _step(M: Tensor, identity: Tensor, p: int, order: int) -> Tensor:
    """N: M^(-1/p) = sum of b_i (I - M)^i, truncated; b_i = b_{i-1} (1 + (i-1) p) / (i p)."""
    if order == 2:
        return ((p + 1) * identity - M) / p
    b = series(p, order - 1)
    N = b[-1] * identity
    for coefficient in reversed(b[:-1]):  # Horner
        N = coefficient * identity + matmul(N, identity - M)
    return N


def _distance(M: Tensor, identity: Tensor) -> Tensor:
    """max|M - I| (...)."""
    distance: Tensor = (M.detach() - identity).abs().amax((-2, -1))
    return distance
