"""Eigenbases that are kept: all anew, or one step of power iteration from the old one."""

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
from funshampoo.linalg.products import aligned, is_plain_memory, multiply
from funshampoo.linalg.solver import identity_like
from funshampoo.linalg.spectral import applied, check_forward_once, decompose, saved
from funshampoo.linalg.stacked_eigh import is_of_the_matrix

Renewed: TypeAlias = tuple[Tensor, Tensor]
"""The basis (..., d, d), and whether (...) it was found."""


@dataclass(frozen=True)
class Basis(ABC):
    """How a basis of eigenvectors, as columns, is found again for a matrix that has changed.

    Attributes:
        relative_cost: as of `RootSolver`.
    """

    relative_cost: ClassVar[float] = 1.0

    @abstractmethod
    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """(the basis (..., d, d), whether (...) it was found).

        Each column stands where the old one lay that it continues.

        Args:
            A: (..., d, d), symmetric.
            old: (..., d, d), the basis before.
            first: (...), bool: there is none before, and the matrix is decomposed.
            begins: whether the host knows that all of them are first.
        """


def decomposed(A: Tensor) -> Renewed:
    """(all eigenvectors by their eigenvalues, the smallest first; whether they were found)."""
    spectrum = decompose(A)
    return spectrum.vectors, spectrum.decomposed


def after_the_first(
    renewed: Callable[[Tensor], Tensor],
    A: Tensor,
    first: Tensor,
    begins: bool,
    beginning: Callable[[Tensor], Renewed] = decomposed,
) -> Renewed:
    """(basis, whether it was found): `renewed(A)`, or `beginning(A)` where there is none before.

    On another device than a CPU nobody waits to hear of a late first one.

    Args:
        renewed: from A (..., d, d) the next basis, (..., d, d).
        A, first, begins: as of `Basis`.
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
    """A basis by one step of power iteration from the one before, made orthogonal by QR.

        Q ← qr(A Q)

    The columns are ordered by diag(Qᵀ A Q), largest first, for the QR alone, which keeps the first
    one as it is and corrects the others by it; each then goes back to its place. So what is
    remembered in the coordinates of the old basis goes on in those of the new. The first time,
    where there is nothing to go on from, by eigendecomposition; of a block whose first gradient
    comes late, on another device than a CPU, by a step from the identity, since the host would have
    to wait to hear of it.

    Right where A changes little between two refreshes, as an average does.

    Reference: Vyas et al., arXiv 2409.11321 (SOAP).
    """

    relative_cost = 0.8

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        return after_the_first(lambda A: power_step(A, old), A, first, begins)


@dataclass(frozen=True)
class Decomposition(Basis):
    """All eigenvectors, every time; those with the largest eigenvalues continue one another."""

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        spectrum = decompose(A)
        rank = rank_by_size(multiply(aligned(A), aligned(old)), old).argsort(-1)
        place = A.shape[-1] - 1 - rank  # eigenvalues ascend
        placed = spectrum.vectors.take_along_dim(place[..., None, :], -1)
        return torch.where(first[..., None, None], spectrum.vectors, placed), spectrum.decomposed


@dataclass(frozen=True)
class by_rank(Basis):
    """All eigenvectors, every time, in the order of their eigenvalues, the smallest first.

    What is remembered column by column then belongs to a rank, and not to a direction: the second
    moments of the third largest eigenvalue go on in the vector that is now third. Where two
    eigenvalues change ranks that is not the same; `linalg.eigh()` has columns continue one another.
    As in the eigenvalue-corrected Shampoo of facebookresearch/optimizers.

    Reference: Eschenhagen et al., arXiv 2506.03595.
    """

    relative_cost = 0.85

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`, but for the places of the columns."""
        return decomposed(A)


@dataclass(frozen=True)
class orthogonal_iteration(Basis):
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

    relative_cost = 0.75

    sort: bool = False
    steps: int = 1

    def __post_init__(self) -> None:
        check_flag("sort", self.sort)
        check_count("steps", self.steps)

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
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


def _largest_first(A: Tensor) -> Renewed:
    vectors, found = decomposed(A)
    return vectors.flip(-1), found


def power_step(A: Tensor, Q: Tensor) -> Tensor:
    """qr(A Q), the columns in their places, (..., d, d)."""
    image = multiply(aligned(A), aligned(Q))
    order = rank_by_size(image, Q)[..., None, :]
    new = orthogonal(image.take_along_dim(order, -1), Q.take_along_dim(order, -1))
    return new.take_along_dim(order.argsort(-1), -1)


def rank_by_size(image: Tensor, Q: Tensor) -> Tensor:
    """The columns of Q (..., d), those with the largest diag(Qᵀ A Q) first; image is A Q."""
    return (image * Q).sum(-2).argsort(dim=-1, descending=True, stable=True)


def orthogonal(Y: Tensor, old: Tensor) -> Tensor:
    """The Q of a QR of Y = A^k Q, with Q the old basis (..., d, d).

    By `cholesky_qr` on a GPU; elsewhere by reflections, on a CPU one by one: LAPACK rounds by where
    a matrix lies in memory. A matrix that the library fails on, by whatever error that is not of
    the call (`stacked_eigh`), gets NaN, and the others of its stack theirs.
    """
    if torch.compiler.is_dynamo_compiling():  # whose graphs can't catch
        return _q_factors(Y, old)
    found: Tensor = applied(_QFactor, Y, old)
    return found


class _QFactor(Function):
    """Y = Q R -> Q, with dQ = Q (T - Tᵀ), T = tril(Qᵀ dY R⁻¹, -1).

    Backward: dY = Q tril(K - Kᵀ, -1) R^(-ᵀ), K = Qᵀ dQ.

    torch's derivative divides by every pivot R_jj. A column whose pivot is rounding alone depends
    on those before it, which say nothing of its direction: it is a constant here.
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
    """(Q, R, which columns (..., 1, d) depend on others); those are the identity's in R."""
    # Of one that failed nothing is chosen, and its gradient is 0·NaN but for this.
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
    if Y.ndim != 3 or not is_plain_memory(Y):
        whole: Tensor = torch.linalg.qr(Y)[0]
        return whole
    found: Tensor = torch.stack([torch.linalg.qr(y.clone())[0] for y in Y])
    return found
