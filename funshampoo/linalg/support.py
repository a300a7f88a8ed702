"""Keeps exact zeros of a matrix exact in functions of it."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.modes import all_true, constant


def on_support(X: Tensor, A: Tensor) -> Tensor:
    """X without the rounding errors between the support of A and the rest.

        X_ij ← 0 where i ≠ j and (A_ii = 0 or A_jj = 0), else X_ij

    If a positive semidefinite A has A_ii = 0, row and column i are zero, in A and in any function
    of it: the i-th unit vector is an exact eigenvector of both. An eigendecomposition leaves
    rounding errors there, which mix coordinates without any gradient with each other and with the
    rest. With five zero rows of side 16, a root in float32 with a relative damping of 1e-6 has
    entries of 0.06 where the largest is 11. Products leave exact zeros.

    Args:
        X: (..., d, d), a function of A such as an inverse root. Its diagonal is kept.
        A: (..., d, d), symmetric positive semidefinite, with exact zeros. No gradient flows to it.

    Returns:
        X itself if no A_ii is zero and that can be read without waiting: on a CPU, outside
        torch.compile. Otherwise a new tensor, whose entries are bitwise X's, or zero.

    >>> A = torch.diag(torch.tensor([1.0, 0.0]))
    >>> on_support(torch.tensor([[1.0, 1e-8], [1e-8, 100.0]]), A)
    tensor([[  1.,   0.],
            [  0., 100.]])
    """
    seen = A.detach().diagonal(dim1=-2, dim2=-1) != 0
    if seen.device.type == "cpu" and all_true(seen):
        return X
    diagonal = _diagonal(A.shape[-1], A.device)
    return torch.where(diagonal | (seen[..., :, None] & seen[..., None, :]), X, 0.0)


@constant
def _diagonal(d: int, device: torch.device) -> Tensor:
    return torch.eye(d, dtype=torch.bool, device=device)
