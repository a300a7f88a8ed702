"""Eigenbases by the QR algorithm, begun in an old basis and ended when that is good enough."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.linalg.adaptive import ritz_values
from funshampoo.linalg.basis import orthogonal
from funshampoo.linalg.norms import is_readable
from funshampoo.linalg.products import aligned, multiply
from funshampoo.linalg.solver import replace_nonfinite, where
from funshampoo.linalg.spectral import Spectrum
from funshampoo.linalg.verification import is_orthogonal


def qr_algorithm(A: Tensor, Q: Tensor, tolerance: float | Tensor, steps: int) -> Spectrum:
    """Approximate eigenvalues, the smallest first, and the basis that they were found in.

        at most `steps` times, while ‖offdiag(QᵀAQ)‖_F > tolerance ‖A‖_F:   Q ← qr(A Q)
        λ = diag(QᵀAQ), and the columns of Q, ordered by λ

    qr(A Q) is Q qr(QᵀAQ), so that these are the steps of the QR algorithm without shifts on QᵀAQ.
    Each matrix ends for itself. Under torch.compile, torch.func and on a GPU all of them make all
    steps, and take those that are theirs.

    Args:
        A: (..., d, d), symmetric; what is not finite counts as not decomposed.
        Q: (..., d, d), orthogonal but for rows of zeros, those of coordinates where A has them too.
        tolerance: a number or (...); below 0 no basis is good enough.
        steps: 0 or more.

    Returns:
        `Spectrum`, whose eigenvalues are those of QᵀAQ's diagonal, no better than the basis is.

    Reference: Golub and Van Loan, Matrix Computations, 8.2 (orthogonal iteration); Eschenhagen et
    al., arXiv 2506.03595.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> qr_algorithm(A, torch.eye(2), 0.0, 30).values.round(decimals=4)
    tensor([1., 3.])
    """
    A, found = replace_nonfinite(A)
    A, Q = aligned(A), aligned(Q)
    with full_precision():
        for _ in range(steps):
            stale = ~(ritz_values(A, Q)[1] <= tolerance)  # one that is not finite, too
            if is_readable([stale]) and not bool(stale.any()):
                break
            new = orthogonal(multiply(A, Q), Q)
            found = found & (is_orthogonal(new) | ~stale)
            Q = where(stale, new, Q)
        values = ritz_values(A, Q)[0]
    order = values.argsort(dim=-1, stable=True)
    vectors = Q.take_along_dim(order[..., None, :], -1).contiguous()
    return Spectrum(values.take_along_dim(order, -1), vectors, found)
