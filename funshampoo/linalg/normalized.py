"""Before and after an iteration: scaling into float32's range, and the verdict."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.linalg.estimates import largest_eigenvalue, spectral_norm
from funshampoo.linalg.products import aligned, matrix_power, multiply, power
from funshampoo.linalg.solver import InverseRoot, or_identity, symmetrize

_RESIDUAL_ITERATIONS = 4
"""Accurate within a factor of 2.2 for d = 512, if all eigenvalues are off by about as much.

An outlier, such as an unconverged eigenvalue among rounding errors, is found in 2 or 3 iterations:
the verdict depends on it.
"""


class Normalized(NamedTuple):
    """A = scale·B, max|B| = 1: B (..., d, d), scale (...), and which (...) A are to be solved.

    B is the identity for the other A. The scale is a constant to autograd: (A / scale)^(-1/p) times
    scale^(-1/p) does not depend on it.
    """

    B: Tensor
    scale: Tensor
    solvable: Tensor


def normalize(A: Tensor, wanted: Tensor) -> Normalized:
    """Divide each matrix by its largest entry, so that the squares in a norm can't overflow.

    A matrix is solvable if it is wanted (...), finite and not zero.
    """
    largest = A.detach().abs().amax((-2, -1))
    solvable = wanted & largest.isfinite() & (largest > 0)
    scale = torch.where(solvable, largest, 1.0)
    B = or_identity(solvable, A) / scale[..., None, None]
    return Normalized(B, scale, solvable)


def certify(
    X: Tensor,
    p: int,
    system: Normalized,
    largest: Tensor,
    max_residual: float,
    power_of_root: int = 1,
) -> InverseRoot:
    """The result for X ≈ B^(-1/p), converged if the root's own residual is small enough.

    The residual is computed from X and B, not taken from the iteration. It is off by rounding of
    about machine epsilon·condition, and is the dtype's largest number if powers of X overflow. A
    root outside the dtype's range does not count as converged. X (..., d, d) must be finite.
    largest: λmax (...) of scale·B, which a caller with relative damping has estimated anyway.
    power_of_root: the power of X that is returned; the residual is that of X.
    """
    B, scale, solvable = system
    X = symmetrize(X)
    most = torch.finfo(B.dtype).max  # inf would say that there was nothing to solve
    residual = _residual(X.detach(), p, B.detach()).nan_to_num(nan=most, posinf=most)
    residual = torch.where(solvable, residual, torch.inf)
    condition = largest.detach() / scale * power(largest_eigenvalue(X.detach()), p)
    root = X * power(scale, -1 / p)[..., None, None]
    converged = residual <= max_residual
    if power_of_root > 1:  # of the identity where it would be of inf, whose derivative is NaN
        root = symmetrize(matrix_power(or_identity(converged, root), power_of_root))
    converged = converged & root.detach().abs().amax((-2, -1)).isfinite()
    condition = torch.where(solvable, condition, torch.inf)
    return InverseRoot(or_identity(converged, root), residual, condition, converged)


def _residual(X: Tensor, p: int, B: Tensor) -> Tensor:
    """‖X^⌈p/2⌉ B X^⌊p/2⌋ - I‖₂."""
    X, B = aligned(X), aligned(B)
    factors = [X] * (p // 2) + [B] + [X] * (p - p // 2)

    def apply(v: Tensor) -> Tensor:
        return reduce(multiply, factors, v) - v

    return spectral_norm(apply, B, _RESIDUAL_ITERATIONS)
