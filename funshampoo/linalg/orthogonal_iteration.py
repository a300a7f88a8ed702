"""Eigenbases whose columns stand where an orthogonal iteration leaves them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from funshampoo.core.checks import check_count, check_flag
from funshampoo.linalg.basis import Basis, after_the_first, decomposed, orthogonal, rank_by_size
from funshampoo.linalg.products import aligned, multiply


@dataclass(frozen=True)
class OrthogonalIteration(Basis):
    """See `orthogonal_iteration`."""

    relative_cost = 0.75

    sort: bool
    steps: int

    def __call__(
        self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Basis`, but for the places of the columns."""
        return after_the_first(lambda A: self._renewed(A, old), A, first, begins, _largest_first)

    def _renewed(self, A: Tensor, old: Tensor) -> Tensor:
        A, image = aligned(A), old
        for _ in range(self.steps):
            image = multiply(A, aligned(image))
        new = orthogonal(image, old)
        if not self.sort:
            return new
        order = rank_by_size(multiply(A, aligned(new)), new)
        return new.take_along_dim(order[..., None, :], -1)


def _largest_first(A: Tensor) -> tuple[Tensor, Tensor]:
    vectors, found = decomposed(A)
    return vectors.flip(-1), found


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

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> Q, found = orthogonal_iteration()(A, torch.eye(2), torch.tensor(True))
    >>> Q.abs(), found
    (tensor([[0., 1.],
            [1., 0.]]), tensor(True))
    """
    check_flag("sort", sort)
    check_count("steps", steps)
    return OrthogonalIteration(sort, steps)
