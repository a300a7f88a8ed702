"""Reuse of old eigenbases, for as long as they diagonalize the matrix well enough."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import full_precision, unwrapped
from funshampoo.linalg.basis import orthogonal
from funshampoo.linalg.estimates import is_orthogonal
from funshampoo.linalg.norms import is_readable, row_norms
from funshampoo.linalg.products import aligned, matmul, multiply
from funshampoo.linalg.solver import chooser, identity_like, replace_nonfinite, where
from funshampoo.linalg.spectral import NearSpectrum, decompose


def spectrum_near(A: Tensor, Q: Tensor, tolerance: Hyper) -> NearSpectrum:
    """The spectrum of each matrix in its old basis if that is good enough, else in a new one.

        B = Qᵀ A Q
        ‖offdiag(B)‖_F ≤ tolerance ‖A‖_F:   λ = diag(B), in the basis Q
        else:                                λ, Q of a new eigendecomposition

    The eigenvalues λ of the old basis (its Ritz values) are off by at most ‖offdiag(B)‖_F. They
    carry derivatives, as does Q if it had any. If the host can read which bases are good, only the
    other matrices are decomposed; under torch.compile and torch.func all are.

    Args:
        A: (..., d, d).
        Q: (..., d, d), orthogonal.
        tolerance: ≥ 0. Rounding alone leaves about √d·(machine epsilon).

    Returns:
        The spectrum; its vectors are the basis to keep, with the eigenvalues in the same order.

    Reference: Eschenhagen et al., arXiv 2506.03595.
    """
    d = A.shape[-1]
    flat, finite = replace_nonfinite(A.reshape(-1, d, d))
    # Always one memory layout, since the rounding of products depends on it.
    Q = Q.reshape(-1, d, d).contiguous()
    values, off = ritz_values(flat, Q)
    good = off <= tolerance
    old = values, Q, torch.ones_like(finite)
    verdicts = unwrapped(good)
    if verdicts is None or verdicts.is_meta or verdicts is not good:
        choose, new = chooser(good), decompose(flat)
        values, vectors, decomposed = [choose(x, y) for x, y in zip(old, new)]
    elif (stale := (~good).nonzero()[:, 0]).numel():
        new = decompose(flat.index_select(0, stale))
        values, vectors, decomposed = [x.index_copy(0, stale, y) for x, y in zip(old, new)]
    else:
        values, vectors, decomposed = old
    found = values, vectors.contiguous(), decomposed & finite, ~good
    return NearSpectrum(*[x.reshape(A.shape[:-2] + x.shape[1:]) for x in found])


def qr_algorithm(A: Tensor, Q: Tensor, tolerance: Hyper, steps: int) -> NearSpectrum:
    """Approximate eigenvalues, in ascending order, and their basis, by the QR algorithm.

        at most `steps` times, while ‖offdiag(QᵀAQ)‖_F > tolerance ‖A‖_F:   Q ← qr(A Q)
        λ = diag(QᵀAQ), and the columns of Q, ordered by λ

    qr(A Q) is Q qr(QᵀAQ), so these are steps of the QR algorithm without shifts on QᵀAQ. Each
    matrix stops on its own. Under torch.compile, torch.func and on a GPU, the steps are computed
    for all matrices, and each keeps those before its own stop.

    Args:
        A: (..., d, d), symmetric; a non-finite matrix counts as not decomposed.
        Q: (..., d, d), orthogonal except for rows of zeros, for coordinates where A is zero too.
        tolerance: a number or (...); below 0 no basis is good enough.
        steps: 0 or more.

    Returns:
        `NearSpectrum`. Its eigenvalues are the diagonal of QᵀAQ, only as good as the basis.

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
            stale = ~(ritz_values(A, Q)[1] <= tolerance)  # NaN counts as stale
            if is_readable([stale]) and not bool(stale.any()):
                break
            new = orthogonal(multiply(A, Q), Q)
            found = found & (is_orthogonal(new) | ~stale)
            Q = where(stale, new, Q)
        values = ritz_values(A, Q)[0]
    order = values.argsort(dim=-1, stable=True)
    vectors = Q.take_along_dim(order[..., None, :], -1).contiguous()
    return NearSpectrum(values.take_along_dim(order, -1), vectors, found, torch.zeros_like(found))


def ritz_values(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """diag(QᵀAQ) (..., d), and ‖offdiag(QᵀAQ)‖_F / ‖A‖_F (...), which is 0 where A is 0.

    The norm is computed from the off-diagonal entries themselves. As √(‖B‖² - ‖diag B‖²) it would
    be pure rounding below about 1e-3 in float32.
    """
    with full_precision():
        B = matmul(matmul(Q.mT, A), Q)
    values = B.diagonal(dim1=-2, dim2=-1)
    scale = A.detach().abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)  # keeps squares in the range of the dtype
    total = row_norms((A.detach() / scale).flatten(-2))
    elsewhere = (1 - identity_like(A)) / scale
    rest = row_norms((B.detach() * elsewhere).flatten(-2))
    return values, rest / torch.where(total > 0, total, 1.0)
