"""Eigenbases that are kept: all anew, or one step of power iteration from the old one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.core.modes import is_traced
from funshampoo.linalg.spectral import decompose


@dataclass(frozen=True)
class QR:
    """One step of simultaneous power iteration from the old basis; see `qr`."""

    def __call__(self, A: Tensor, old: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """(the basis, whether it was found).

        Args:
            A: (..., d, d).
            old: (..., d, d), the basis before, as columns.
            first: (...), bool: there is none before, and the matrix is decomposed.
        """
        if is_traced():
            new, decomposed = decompose(A).vectors, decompose(A).decomposed
            stepped = power_step(A, old)
            basis = torch.where(first[..., None, None], new, stepped)
            return basis, torch.where(first, decomposed, True) & _is_finite(basis)
        if not first.any():
            new = power_step(A, old)
            return new, _is_finite(new)
        spectrum = decompose(A)
        if first.all():
            return spectrum.vectors, spectrum.decomposed
        basis = torch.where(first[..., None, None], spectrum.vectors, power_step(A, old))
        return basis, torch.where(first, spectrum.decomposed, True) & _is_finite(basis)


@dataclass(frozen=True)
class Decomposition:
    """All eigenvectors, every time."""

    def __call__(self, A: Tensor, old: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """As `QR.__call__`; each new column stands where the old one lay that it continues."""
        spectrum = decompose(A)
        rank = by_size(A, old).argsort(-1)  # eigenvalues ascend: the largest goes to the largest
        last = A.shape[-1] - 1
        placed = spectrum.vectors.take_along_dim((last - rank)[..., None, :], -1)
        basis = torch.where(first[..., None, None], spectrum.vectors, placed)
        return basis, spectrum.decomposed


def qr() -> QR:
    """A basis by one step of power iteration from the one before, made orthogonal by QR.

        Q ← qr(A Q)

    The columns are ordered by diag(Qᵀ A Q), largest first, for the QR alone, which keeps the first
    one as it is and corrects the others by it; each then goes back to its place. So what is
    remembered in the coordinates of the old basis goes on in those of the new. The first time,
    where there is nothing to go on from, by eigendecomposition.

    Right where A changes little between two refreshes, as an average does.

    Reference: Vyas et al., arXiv 2409.11321 (SOAP).
    """
    return QR()


def power_step(A: Tensor, Q: Tensor) -> Tensor:
    """qr(A Q), the columns in their places, (..., d, d)."""
    image = A @ Q
    order = _order(image, Q)[..., None, :]
    new = torch.linalg.qr(image.take_along_dim(order, -1))[0]
    return new.take_along_dim(order.argsort(-1), -1)


def by_size(A: Tensor, Q: Tensor) -> Tensor:
    """The columns of Q (..., d), those with the largest diag(Qᵀ A Q) first."""
    return _order(A @ Q, Q)


def _order(image: Tensor, Q: Tensor) -> Tensor:
    return (image * Q).sum(-2).argsort(dim=-1, descending=True, stable=True)


def _is_finite(Q: Tensor) -> Tensor:
    return Q.isfinite().all(-1).all(-1)
