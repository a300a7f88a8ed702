"""What a matrix has never seen stays exactly apart from what it has."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.modes import all_true
from funshampoo.linalg.solver import identity_like


def on_support(X: Tensor, A: Tensor) -> Tensor:
    """A function X of A, with exact zeros beside the diagonal where A has a row of zeros.

    A positive semidefinite A whose entry a_ii is exactly zero has nothing else in that row and that
    column, so no function of it has anything there beside the diagonal; a computed X has rounding
    errors, as large as its largest entry lets them be, that would move what must stay.

    Args:
        X: (..., d, d), computed from A.
        A: (..., d, d), positive semidefinite.

    Returns:
        X itself where no diagonal entry is zero, as far as that can be read without waiting.

    >>> on_support(torch.ones(2, 2), torch.diag(torch.tensor([3.0, 0.0])))
    tensor([[1., 0.],
            [0., 1.]])
    """
    seen = A.detach().diagonal(dim1=-2, dim2=-1) != 0
    if seen.device.type == "cpu" and all_true(seen):
        return X
    both = seen[..., :, None] & seen[..., None, :]
    return torch.where(both | identity_like(A).bool(), X, 0.0)
