"""The Q of a QR decomposition by products, for devices that multiply faster than they reflect."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.linalg.estimates import scattered

MARGIN = 8
"""Machine epsilons of the whole matrix' norm that its smallest columns are lifted to."""


def cholesky_qr(Y: Tensor, spare: Tensor) -> Tensor:
    """An orthonormal basis of Y's columns, each in the space of those up to it, (..., d, d).

        Y ← Y + 8 ε ‖Y‖ S
        three times:  Y ← Y D⁻¹,   RᵀR = YᵀY + 2 d ε I,   Y ← Y R⁻¹,   the last time without 2 d ε

    with D the lengths of the columns, ‖·‖ the Frobenius norm and ε the machine epsilon. The factor
    R of YᵀY loses what is below √ε of the longest column; the shift keeps it positive definite,
    and the next round makes up for it. S keeps the first round from a matrix without full rank.
    Columns have the sign that they come with, R's diagonal being positive; Householder's may be the
    other.

    A GPU decomposes 64 matrices of 1,024 rows by reflections in 300 ms (torch 2.11, H100): one by
    one. These are products and triangular solves of the whole stack, and nothing is read by the
    host. Where Y = A Q and S = Q, orthonormal to some ε at any condition of A; a Y far from that
    (the Hilbert matrix, with S = I) to 1,000 ε at 2,048 rows. Of what is not finite, not finite.

    Args:
        Y: (..., d, d), floating point.
        spare: S (..., d, d), for directions that Y may lack: for Y = A Q that is Q, so that Y's
            columns are those of (A + 8 ε ‖Y‖ I) Q. Rows of zeros, those of coordinates that no
            gradient has touched, are filled with pseudo-random numbers.

    Reference: Fukaya et al., arXiv 1809.11085 (shifted Cholesky QR).

    >>> A = torch.diag(torch.tensor([4.0, 1.0]))
    >>> cholesky_qr(A @ torch.tensor([[0.6, -0.8], [0.8, 0.6]]), torch.eye(2)).round(decimals=4)
    tensor([[ 0.9487, -0.3162],
            [ 0.3162,  0.9487]])
    """
    d, epsilon = Y.shape[-1], torch.finfo(Y.dtype).eps
    eye = torch.eye(d, dtype=Y.dtype, device=Y.device)
    with full_precision():
        largest = Y.detach().abs().amax((-2, -1), keepdim=True)
        Y = Y / torch.where(largest > 0, largest, 1.0)  # squares stay in the range of the dtype
        size = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
        Y = Y + MARGIN * epsilon * torch.where(size > 0, size, 1.0) * _completed(spare)
        for last in (False, False, True):
            Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True)
            gram = Y.mT @ Y
            shifted = gram if last else gram + 2 * d * epsilon * eye
            R, _ = torch.linalg.cholesky_ex(shifted, upper=True)
            Y = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    found: Tensor = Y
    return found


def _completed(spare: Tensor) -> Tensor:
    """With rows of about length 1 in the place of those that are zeros: so it has full rank."""
    d = spare.shape[-1]
    missing = (spare == 0).all(-1, keepdim=True)
    filling = (3 / d) ** 0.5 * scattered(d * d, spare.dtype, spare.device).reshape(d, d)
    return torch.where(missing, filling, spare)
