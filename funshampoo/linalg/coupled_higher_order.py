"""Rational inverse roots by coupled iterations of higher order."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.linalg.coupled_newton import iterate
from funshampoo.linalg.normalized import certify, normalize
from funshampoo.linalg.products import matrix_power
from funshampoo.linalg.solver import (
    InverseRoot,
    RootSolver,
    Solver,
    add_to_diagonal,
    check_at_least,
    check_exponent,
    check_matrix,
    replace_nonfinite,
)


def coupled_higher_order(
    *,
    relative_epsilon: float = 1e-6,
    absolute_epsilon: float = 0.0,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
    order: int = 3,
    max_residual: float = 0.5,
) -> Solver:
    """Inverse root by coupled iterations of order 2 (Newton), 3, ..., for rational p = m/q.

        ridge = max(relative_epsilon ‖A‖_∞, absolute_epsilon),   Ã = A + ridge·I
        X = z^(1/m) I,   M = z Ã,   z = 1 / tr Ã
        while max|M - I| > tolerance:   X ← X N,   M ← N^m M
        N = b_0 I + b_1 (I - M) + ... + b_{order-1} (I - M)^{order-1},  the series of M^(-1/m)

    and the root is X^q. A step takes more products than Newton's and gains more digits. The ridge
    takes the place of the epsilon that the solver is called with, which has no effect: as in the
    Distributed Shampoo reference, for whose users this is here. Stopping, verdict and gradients are
    as for `coupled_newton`, without retries.

    Raises ValueError for a negative number, order < 2, or p ≤ 0; TypeError for a dtype other than
    float32 and float64. Shi et al., arXiv 2309.06497, for its use in Shampoo.

    >>> A = torch.diag(torch.tensor([1.0, 32.0]))
    >>> coupled_higher_order(relative_epsilon=0.0)(A, 5 / 2, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.2500]])
    """
    check_at_least("relative_epsilon", relative_epsilon, 0)
    check_at_least("absolute_epsilon", absolute_epsilon, 0)
    check_at_least("max_iterations", max_iterations, 0)
    check_at_least("tolerance", tolerance, 0)
    check_at_least("order", order, 2)
    check_at_least("max_residual", max_residual, 0)

    return _CoupledHigherOrder(
        relative_epsilon, absolute_epsilon, max_iterations, tolerance, order, max_residual
    )


@dataclass(frozen=True, eq=False)
class _CoupledHigherOrder(RootSolver):
    relative_cost = 60.0

    relative_epsilon: float
    absolute_epsilon: float
    max_iterations: int
    tolerance: float
    order: int
    max_residual: float

    def __call__(self, A: Tensor, p: float, epsilon: float | Tensor = 0.0) -> InverseRoot:
        check_matrix(A)
        check_exponent(p)
        with full_precision():
            return self._solve(A, Fraction(p).limit_denominator(100))

    def _solve(self, A: Tensor, root: Fraction) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        largest_row_sum = A.abs().sum(-1).amax(-1)
        ridge = torch.clamp(self.relative_epsilon * largest_row_sum, min=self.absolute_epsilon)
        system = normalize(add_to_diagonal(A, ridge), finite)
        z = 1 / system.B.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        X = iterate(system, z, root.numerator, self.max_iterations, self.tolerance, self.order)
        result = certify(X, root.numerator, system, self.max_residual)
        return result._replace(root=matrix_power(result.root, root.denominator))
