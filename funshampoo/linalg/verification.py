"""Whether what a library returned without an error is an eigendecomposition at all."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.linalg.estimates import probe_vectors


def is_decomposition(A: Tensor, values: Tensor, Q: Tensor) -> Tensor:
    """Whether (...) λ (..., d) and Q (..., d, d) are a decomposition of A (..., d, d).

    By a few vectors v, in five products of 8 rows beside a decomposition of nine whole ones:

        ‖v Q Qᵀ - v‖ ≤ 8 √ε ‖v‖,   ‖v Q Λ Qᵀ - v A‖ ≤ 8 √ε ‖v‖ ‖A‖,   ‖A‖ = max_i Σ_j |A_ij|

    with ε the machine epsilon of the dtype. LAPACK's errors are some ε of both. What is wrong by
    more than 8 √ε of the whole is told, at any side: one eigenvector of 1,000, for an eigenvalue
    near the largest, leaves 0.04. Errors of small eigenvalues alone are not. Of a matrix so small
    that rounding is absolute (‖A‖ below the smallest normal number) finite values and an orthogonal
    Q are all that is asked.

    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> is_decomposition(A, torch.tensor([1.0, 4.0]), torch.eye(2))
    tensor(True)
    >>> is_decomposition(A, torch.tensor([0.0, 0.0]), torch.eye(2))
    tensor(False)
    """
    limit = 8 * torch.finfo(A.dtype).eps ** 0.5
    size = A.abs().sum(-1).amax(-1)
    is_normal = size >= torch.finfo(A.dtype).tiny
    scale = torch.where(is_normal, size, 1.0)[..., None, None]  # no square leaves the range
    v = probe_vectors(A)
    turned = v @ Q
    off = (turned * (values[..., None, :] / scale)) @ Q.mT - (v / scale) @ A
    fits = (_relative(off, v) <= limit) | ~is_normal
    found: Tensor = (_relative(turned @ Q.mT - v, v) <= limit) & fits & values.isfinite().all(-1)
    return found


def is_orthogonal(Q: Tensor) -> Tensor:
    """Whether (...) Q (..., d, d) is orthogonal: ‖v Q Qᵀ - v‖ ≤ 8 √ε ‖v‖, as of `is_decomposition`.

    >>> is_orthogonal(torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    tensor(True)
    >>> is_orthogonal(torch.full((2, 2), torch.nan))
    tensor(False)
    """
    v = probe_vectors(Q)
    found: Tensor = _relative(v @ Q @ Q.mT - v, v) <= 8 * torch.finfo(Q.dtype).eps ** 0.5
    return found


def _relative(x: Tensor, v: Tensor) -> Tensor:
    """The largest ‖x‖ / ‖v‖ (...) of the rows of x (..., n, d) and v (n, d)."""
    ratios: Tensor = torch.linalg.vector_norm(x, dim=-1) / torch.linalg.vector_norm(v, dim=-1)
    return ratios.amax(-1)
