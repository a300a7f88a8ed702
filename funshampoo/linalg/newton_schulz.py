"""Inverse roots by a fixed number of matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import full_precision, is_differentiated
from funshampoo.linalg.estimates import largest_eigenvalue
from funshampoo.linalg.normalized import certify, normalize
from funshampoo.linalg.products import matmul, matrix_power, power
from funshampoo.linalg.root_steps import TABLES, Step, root_steps
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

_LARGEST = 16.0
"""Eigenvalues of M are in [0, 1.4], and those of N below 7, unless a matrix has negative ones."""


@dataclass(frozen=True, eq=False, kw_only=True)
class newton_schulz(RootSolver):
    """Inverse root by a fixed number of coupled polynomial steps, for integer p, 3/2 and 9/2.

    The coupled iteration of Guo and Higham (see `coupled_newton`) with polynomials other than
    Newton's, on Ã = A + damping·I with c = ‖Ã‖_∞ ≥ λmax:
        X = I,   M = Ã / c
        N = e(M),   X ← X N,   M ← N^⌊p/2⌋ M N^⌈p/2⌉     for each step's polynomial e
        Ã^(-1/p) = c^(-1/p) X
    In exact arithmetic each step maps x = (eigenvalue of M)^(1/p) to x e(x^p). First come a few
    steps of one polynomial of degree 4 that makes the least x grow, then the best polynomial for
    the interval that by then holds all x, then the series of M^(-1/p) around 1. At the defaults
    these are 27, 31, 30, 30, 30 and 34 products for p = 2, 3, 4, 6, 8 and 9 at side 1,024; any
    other p uses the series alone, 70 products for p = 5. p = 1, 3/2 and 9/2 are squares of p = 2, 3
    and 9, and have their residuals. The host reads nothing.

    N multiplies M from both sides. N^p M equals that except for rounding, but there the errors that
    a steep e makes in M do not cancel: at side 128, two fifths of the roots for p = 4 and a
    condition of 1e6 had residuals above max_residual in float32, where they are 0.06 to 0.08 now.

    The best odd polynomials for an interval, those of p = 2, are those of the matrix sign (Amsel et
    al., arXiv 2505.16932; Grishina et al., arXiv 2506.10935). Those of other p are found likewise.

    The number of steps follows from condition, tolerance, p and d: it takes eigenvalues from λmax /
    condition to within `tolerance` of their limit. So it compiles, batches, and differentiates to
    any order. For a matrix that requires gradients the tolerance is squared, since a close
    polynomial need not have a close slope. A root whose residual is above max_residual is never
    returned: `converged` is False. That is what happens to a matrix with a larger condition number
    than promised. In float64, tolerance=1e-12 gives errors of 1e-10.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2]. The returned λmax and
    condition are estimates by power iterations.
    condition: the largest λmax / λmin of Ã to be prepared for, about 1 / relative_epsilon.
    max_residual: see `coupled_newton`.
    Raises ValueError for a negative number as relative_epsilon, epsilon or max_residual, a
    condition below 1 or of inf, tolerance < 1e-14, or another p; TypeError for a dtype other than
    float32 and float64.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> newton_schulz(relative_epsilon=0.0)(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = {"relative_epsilon": 0, "condition": 1, "tolerance": 1e-14, "max_residual": 0}
    relative_cost = 5.0

    relative_epsilon: Hyper = 1e-6
    condition: float = 1e6
    tolerance: float = 1e-6
    max_residual: float = 0.5

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        with full_precision():
            return self._solve(A, *degree_and_power(p), epsilon)

    def _solve(self, A: Tensor, p: int, q: int, epsilon: Hyper) -> InverseRoot:
        A, finite = replace_nonfinite(A)
        largest = largest_eigenvalue(A)
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: largest)
        system = normalize(add_to_diagonal(A, damping), finite)
        # A close polynomial need not have a close slope: its derivative takes one more step.
        tolerance = max(self.tolerance**2, 1e-14) if is_differentiated(A) else self.tolerance
        X = _inverse_root(system.B, p, self.condition, tolerance)
        return certify(X, p, system, largest + damping, self.max_residual, power_of_root=q)


def takes(p: float) -> bool:
    """Whether `newton_schulz` can compute A^(-1/p)."""
    return float(p).is_integer() or 2 * p in TABLES


def degree_and_power(p: float) -> tuple[int, int]:
    """(m, q) of A^(-1/p) = (A^(-1/m))^q for a p that `newton_schulz` takes.

    Raises:
        ValueError: for any other p.
    """
    check_exponent(p)
    if p == 1 or (p != int(p) and takes(p)):
        return int(2 * p), 2
    return integer_exponent(p, "newton_schulz", others="others than 3/2 and 9/2"), 1


def _inverse_root(B: Tensor, p: int, condition: float, tolerance: float) -> Tensor:
    """B^(-1/p), finite whatever B's eigenvalues are."""
    # ‖B‖_∞ is between λmax and √d λmax; without a gradient, since the root does not depend on it.
    scale, identity = B.detach().abs().sum(-1).amax(-1)[..., None, None], identity_like(B)
    lower = condition ** (-1 / p) * math.sqrt(B.shape[-1]) ** (-1 / p)  # the product may be inf
    M, X = B / scale, identity.expand_as(B)
    steps = root_steps(p, lower, tolerance)
    for i, step in enumerate(steps):
        N = _on_course(_polynomial(step, M, identity), identity)
        X = matmul(X, N) if i else N
        if i + 1 < len(steps):
            left = matrix_power(N, p // 2)
            right = matmul(left, N) if p % 2 else left
            M = _on_course(matmul(matmul(left, M), right), identity)
    return X * power(scale, -1 / p)


def _polynomial(step: Step, M: Tensor, identity: Tensor) -> Tensor:
    """a I + b M + c M² + d M³ + e M⁴, or in I - M; with one product up to c, else two."""
    M = identity - M if step.around_one else M
    a, b, *rest = step.coefficients
    N = torch.add(a * identity, M, alpha=b)
    if not rest:
        return N
    square = matmul(M, M)
    if len(rest) == 1:
        return torch.add(N, square, alpha=rest[0])
    c, d, e = rest
    return N + matmul(square, torch.add(torch.add(c * identity, M, alpha=d), square, alpha=e))


def _on_course(X: Tensor, identity: Tensor) -> Tensor:
    """X, with the identity in place of matrices that have left the range of their iteration.

    They would overflow, and 0·inf is NaN in the backward pass. The root's residual shows them.
    """
    largest: Tensor = torch.linalg.vector_norm(X.detach(), math.inf, dim=(-2, -1))
    return where(largest < _LARGEST, X, identity)
