"""Eigenbases that are kept between refreshes: recomputed, or updated by power iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from funshampoo.core.checks import check_count, check_flag
from funshampoo.core.modes import full_precision, is_traced
from funshampoo.linalg.cholesky_qr import cholesky_qr
from funshampoo.linalg.estimates import is_orthogonal
from funshampoo.linalg.norms import is_readable
from funshampoo.linalg.products import aligned, each_matrix, multiply
from funshampoo.linalg.solver import identity_like
from funshampoo.linalg.spectral import applied, check_forward_once, decompose, saved
from funshampoo.linalg.stacked_eigh import is_of_the_matrix

Renewed: TypeAlias = tuple[Tensor, Tensor]
"""The basis (..., d, d), and whether (...) it was found."""


@dataclass(frozen=True)
class Basis(ABC):
    """How to update a basis of eigenvectors (columns) for a matrix that has changed.

    Attributes:
        relative_cost: as in `RootSolver`.
    """

    relative_cost: ClassVar[float] = 1.0

    @abstractmethod
    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """(the basis (..., d, d), whether (...) it was found).

        Each column takes the place of the old column that it continues.

        Args:
            A: (..., d, d), symmetric.
            old: (..., d, d), the basis before.
            first: (...), bool: there is no old basis, and the matrix is decomposed.
            begins: whether the host knows that `first` is all True.
        """


def decomposed(A: Tensor) -> Renewed:
    """(all eigenvectors, in ascending order of eigenvalue; whether the decomposition succeeded)."""
    spectrum = decompose(A)
    return spectrum.vectors, spectrum.decomposed


def after_the_first(
    renewed: Callable[[Tensor], Tensor],
    A: Tensor,
    first: Tensor,
    begins: bool,
    beginning: Callable[[Tensor], Renewed] = decomposed,
) -> Renewed:
    """(basis, whether it was found): `renewed(A)`, or `beginning(A)` where there is no old basis.

    On a device other than a CPU, nothing waits to learn whether a late first basis is needed.

    Args:
        renewed: computes the next basis, (..., d, d), from A (..., d, d).
        A, first, begins: as in `Basis`.
        beginning: a decomposition.
    """
    if is_readable([first]):
        begins, late = bool(first.all()), bool(first.any())
    else:
        late = is_traced()
    if begins:
        return beginning(A)
    new = renewed(A)
    found = is_orthogonal(new)
    if not late:
        return new, found
    vectors, known = beginning(A)
    new = torch.where(first[..., None, None], vectors, new)
    return new, torch.where(first, known, found)


@dataclass(frozen=True)
class qr(Basis):
    """A basis by one step of power iteration from the old one, orthogonalized by QR.

        Q ← qr(A Q)

    The columns are sorted by diag(Qᵀ A Q), largest first, only for the QR, which keeps the first
    column and orthogonalizes the others against it; then each goes back to its place. So values
    stored in the old basis' coordinates carry over to the new. The first basis, without an old one,
    comes from an eigendecomposition; on a device other than a CPU, a block whose first gradient
    comes late takes a step from the identity, since the host would have to wait to learn of it.

    Accurate if A changes little between two refreshes, as an average does.

    Reference: Vyas et al., arXiv 2409.11321 (SOAP).
    """

    relative_cost = 0.8

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        return after_the_first(lambda A: power_step(A, old), A, first, begins)


@dataclass(frozen=True)
class Decomposition(Basis):
    """All eigenvectors, every time; each takes the place of the old column of the same rank."""

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        spectrum = decompose(A)
        rank = rank_by_size(multiply(aligned(A), aligned(old)), old).argsort(-1)
        place = A.shape[-1] - 1 - rank  # eigenvalues ascend
        placed = spectrum.vectors.take_along_dim(place[..., None, :], -1)
        return torch.where(first[..., None, None], spectrum.vectors, placed), spectrum.decomposed


@dataclass(frozen=True)
class by_rank(Basis):
    """All eigenvectors, every time, in ascending order of their eigenvalues.

    Values stored per column then belong to a rank, not to a direction: the second moments of the
    third largest eigenvalue carry over to the vector that is now third. This matters where two
    eigenvalues change ranks; with `linalg.eigh()` each column continues an old one. As in the
    eigenvalue-corrected Shampoo of facebookresearch/optimizers.

    Reference: Eschenhagen et al., arXiv 2506.03595.
    """

    relative_cost = 0.85

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`, except for the order of the columns."""
        return decomposed(A)


@dataclass(frozen=True)
class orthogonal_iteration(Basis):
    """A basis by powers of A applied to the old one, orthogonalized by QR, as in several sources.

        Q ← qr(Aⁿ Q),   n = steps

    The first columns converge to the eigenvectors of the largest eigenvalues. Unlike `qr()`, it
    sorts nothing before the QR, which keeps the first column and orthogonalizes the others against
    it, whichever eigenvalues they now belong to. The first basis comes from an eigendecomposition,
    largest first.

    Args:
        sort: afterwards order the columns by diag(Qᵀ A Q), largest first. Values stored per column
            then belong to a rank, not to a direction.
        steps: products with A before the QR.

    Raises:
        ValueError, TypeError: steps is not an int of at least 1, or sort is not a bool.

    Reference: Golub and Van Loan, Matrix Computations, 8.2; Lin et al., arXiv 2509.03378; with sort
    NVIDIA-NeMo/Emerging-Optimizers.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> Q, found = orthogonal_iteration()(A, torch.eye(2), torch.tensor(True))
    >>> Q.abs(), found
    (tensor([[0., 1.],
            [1., 0.]]), tensor(True))
    """

    relative_cost = 0.75

    sort: bool = False
    steps: int = 1

    def __post_init__(self) -> None:
        check_flag("sort", self.sort)
        check_count("steps", self.steps)

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`, except for the order of the columns."""
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


def _largest_first(A: Tensor) -> Renewed:
    vectors, found = decomposed(A)
    return vectors.flip(-1), found


def power_step(A: Tensor, Q: Tensor) -> Tensor:
    """qr(A Q) (..., d, d), with every column in its old place."""
    image = multiply(aligned(A), aligned(Q))
    order = rank_by_size(image, Q)[..., None, :]
    new = orthogonal(image.take_along_dim(order, -1), Q.take_along_dim(order, -1))
    return new.take_along_dim(order.argsort(-1), -1)


def rank_by_size(image: Tensor, Q: Tensor) -> Tensor:
    """The columns of Q (..., d), in descending order of diag(Qᵀ A Q); image is A Q."""
    return (image * Q).sum(-2).argsort(dim=-1, descending=True, stable=True)


def orthogonal(Y: Tensor, old: Tensor) -> Tensor:
    """The Q of a QR of Y = A^k Q, where Q is the old basis (..., d, d).

    By `cholesky_qr` on a GPU; elsewhere by reflections, on a CPU one by one, since LAPACK's
    rounding depends on a matrix's position in memory. If the library fails on a matrix, with any
    error that is not about the call (`stacked_eigh`), that matrix is NaN; the others get their Q.
    """
    if torch.compiler.is_dynamo_compiling():  # its graphs can't catch exceptions
        return _q_factors(Y, old)
    found: Tensor = applied(_QFactor, Y, old)
    return found


class _QFactor(Function):
    """Y = Q R -> Q, with dQ = Q (T - Tᵀ), T = tril(Qᵀ dY R⁻¹, -1).

    Backward: dY = Q tril(K - Kᵀ, -1) R^(-ᵀ), K = Qᵀ dQ.

    torch's derivative divides by every pivot R_jj. A column whose pivot is only rounding depends on
    the columns before it, which do not determine its direction: it is a constant here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(Y: Tensor, old: Tensor) -> Tensor:
        return _caught(Y, old)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        saved(ctx, inputs[0], output)

    @staticmethod
    def backward(ctx: Any, dQ: Tensor) -> tuple[Tensor, None]:
        with full_precision():
            Q, R, lost = _factored(*ctx.saved_tensors)
            K = Q.mT @ dQ
            M = torch.where(lost, 0.0, (K - K.mT).tril(-1))
            return Q @ torch.linalg.solve_triangular(R.mT, M, upper=False, left=False), None

    @staticmethod
    def jvp(ctx: Any, dY: Tensor, _: Tensor | None) -> Tensor:
        check_forward_once()
        with full_precision():
            Q, R, lost = _factored(*ctx.saved_tensors)
            Z = torch.linalg.solve_triangular(R, Q.mT @ dY, upper=True, left=False)
            T = torch.where(lost, 0.0, Z.tril(-1))
            return Q @ (T - T.mT)


def _factored(Y: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, R, which columns (..., 1, d) are dependent); R has the identity's columns there."""
    # Results for a failed matrix are not used, but its gradient would still be 0·NaN.
    Y, Q = [torch.where(x.isfinite(), x, 0.0) for x in (Y, Q)]
    R = Q.mT @ Y
    pivots, info = R.detach().diagonal(dim1=-2, dim2=-1).abs(), torch.finfo(R.dtype)
    rounding = R.shape[-1] * info.eps * R.detach().abs().amax((-2, -1))[..., None]
    lost = (~(pivots > rounding.clamp(min=info.tiny)))[..., None, :]
    return Q, torch.where(lost, identity_like(R), R).triu(), lost


def _caught(Y: Tensor, old: Tensor) -> Tensor:
    try:
        return _q_factors(Y, old)
    except Exception as error:
        if not is_of_the_matrix(error):
            raise
        if Y.ndim < 3:
            return torch.full_like(Y, torch.nan)
        flat, olds = Y.reshape(-1, *Y.shape[-2:]), old.expand_as(Y).reshape(-1, *Y.shape[-2:])
        return torch.stack([_caught(*pair) for pair in zip(flat, olds)]).reshape(Y.shape)


def _q_factors(Y: Tensor, old: Tensor) -> Tensor:
    if Y.is_cuda:
        return cholesky_qr(Y, old)
    found: Tensor = each_matrix(torch.linalg.qr, Y)[0]
    return found
