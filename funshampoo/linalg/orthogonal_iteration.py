"""Eigenbases whose columns stand where an orthogonal iteration leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_flag
from funshampoo.core.modes import is_traced
from funshampoo.linalg.basis import Basis, is_finite, orthogonal, rank_by_size
from funshampoo.linalg.norms import is_readable
from funshampoo.linalg.products import aligned, multiply
from funshampoo.linalg.spectral import decompose


@dataclass(frozen=True)
class OrthogonalIteration(Basis):
    """See `orthogonal_iteration`."""

    sort: bool
    steps: int

    def __call__(
        self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Basis`, but for the places of the columns."""
        if is_readable([first]):
            begins, late = bool(first.all()), bool(first.any())
        else:
            late = is_traced()
        if begins:
            return _decomposed(A)
        A, image = aligned(A), old
        for _ in range(self.steps):
            image = multiply(A, aligned(image))
        new = orthogonal(image)
        if self.sort:
            order = rank_by_size(multiply(A, aligned(new)), new)
            new = new.take_along_dim(order[..., None, :], -1)
        found = is_finite(new)
        if not late:
            return new, found
        vectors, decomposed = _decomposed(A)
        new = torch.where(first[..., None, None], vectors, new)
        return new, torch.where(first, decomposed, found)


def _decomposed(A: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors, those with the largest eigenvalues first."""
    spectrum = decompose(A)
    return spectrum.vectors.flip(-1), spectrum.decomposed


def orthogonal_iteration(sort: bool = False, steps: int = 1) -> Basis:
    """A basis by powers of A on the one before, made orthogonal by QR, as several sources have it.

        Q ← qr(Aⁿ Q),   n = steps

    The first columns converge to the eigenvectors of the largest eigenvalues. Unlike with `qr()`
    nothing is ordered before the QR, which keeps the first column as it is and corrects the others
    by it, whichever eigenvalues they have come to belong to. The first time by eigendecomposition,
    largest first.

    Args:
        sort: order the columns by diag(Qᵀ A Q) afterwards, largest first. What is remembered column
            by column then belongs to a rank, and not to a direction.
        steps: products with A before the QR.

    Raises:
        ValueError, TypeError: steps is no int of at least 1, or sort no bool.

    Reference: Golub and Van Loan, Matrix Computations, 8.2; Lin et al., arXiv 2509.03378; with sort
    NVIDIA-NeMo/Emerging-Optimizers.

    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> Q, found = orthogonal_iteration()(A, torch.eye(2), torch.tensor(True))
    >>> Q.abs(), found
    (tensor([[0., 1.],
            [1., 0.]]), tensor(True))
    """
    check_flag("sort", sort)
    check_count("steps", steps)
    return OrthogonalIteration(sort, steps)
