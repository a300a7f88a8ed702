"""Inverse roots by eigendecomposition, of damped matrices and of rank-deficient ones."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.live import Live, initial, is_exactly
from funshampoo.core.modes import full_precision
from funshampoo.linalg.adaptive import spectrum_near
from funshampoo.linalg.solver import (
    InverseRoot,
    RootSolver,
    add_to_diagonal,
    check_exponent,
    check_matrix,
    total_damping,
)
from funshampoo.linalg.spectral import AnySpectrum, NearSpectrum, decompose, inverse_root


class EigenSolver(RootSolver):
    """A `RootSolver` whose only expensive part is an eigendecomposition, or a substitute for it."""

    threaded: ClassVar[bool] = True

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """A^(-1/p), with a new eigendecomposition."""
        self._check(A, p)
        spectrum = decompose(A)  # no products, and perhaps long: other threads need not wait
        with full_precision():
            return self.from_spectrum(A, spectrum, p, epsilon)

    def near_basis(
        self, A: Tensor, p: float, epsilon: Hyper, basis: Tensor, tolerance: Hyper
    ) -> tuple[InverseRoot, Tensor]:
        """A^(-1/p), and the basis it is computed in: the given one, if that is good enough.

        Args:
            A: (..., d, d).
            p, epsilon: as in `RootSolver`.
            basis: (..., d, d), orthogonal: eigenvectors of an earlier A as columns.
            tolerance: see `spectrum_near`.
        """
        self._check(A, p)
        spectrum = self.renewed(A, epsilon, basis, tolerance)
        with full_precision():
            return self.from_spectrum(A, spectrum, p, epsilon), spectrum.vectors

    def renewed(self, A: Tensor, epsilon: Hyper, basis: Tensor, tolerance: Hyper) -> NearSpectrum:
        """The spectrum of A that `near_basis` uses."""
        return spectrum_near(A, basis, tolerance)

    @abstractmethod
    def from_spectrum(
        self, A: Tensor, spectrum: AnySpectrum, p: float, epsilon: Hyper
    ) -> InverseRoot:
        """A^(-1/p) from a spectrum of A, exact or approximate, in any order."""

    def _check(self, A: Tensor, p: float) -> None:
        check_matrix(A)
        check_exponent(p)


@dataclass(frozen=True, eq=False, kw_only=True)
class eigh(EigenSolver):
    """Inverse root by eigendecomposition (Shampoo, arXiv 1802.09568), for any p > 0.

        A = Q diag(λ) Qᵀ,   X = Q diag(λ̃^(-1/p)) Qᵀ
        damping = epsilon + relative_epsilon·λmax
        floor=True:   λ̃ = max(λ, 0) + damping
        floor=False:  λ̃ = λ - min(λmin, 0) + damping

    If A is positive semidefinite the two agree; they differ in how they repair eigenvalues that
    rounding made negative. The floor moves only those; floor=False shifts the whole spectrum, as in
    the reference implementation of Distributed Shampoo (arXiv 2309.06497). In float32, eigenvalues
    below about 1e-7·λmax are rounding errors: keep the damping above that, or use `pseudo_inverse`.

    If LAPACK fails on a matrix, that matrix alone is decomposed again in float64 (not inside
    torch.compile, where the error is raised). A root fails if λ̃ is not positive, or if the result
    is not a decomposition (`estimates.is_decomposition`). Derivatives with respect to A, epsilon
    and relative_epsilon, backward and forward, are finite at tied eigenvalues, and treat the repair
    as a constant; second derivatives raise NotImplementedError.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2].
    Raises ValueError for a negative number as relative_epsilon or epsilon, or p ≤ 0; TypeError for
    a dtype other than float32 and float64.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> eigh()(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = {"relative_epsilon": 0}

    relative_epsilon: Hyper = 0.0
    floor: bool = True

    def from_spectrum(
        self, A: Tensor, spectrum: AnySpectrum, p: float, epsilon: Hyper
    ) -> InverseRoot:
        """See `EigenSolver`."""
        values = spectrum.values
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: values.amax(-1))
        repair = (-values if self.floor else -values.amin(-1, keepdim=True)).clamp(min=0)
        repaired = values + repair + damping[..., None]
        return inverse_root(add_to_diagonal(A, damping), spectrum, repaired, None, p)


@dataclass(frozen=True, eq=False, kw_only=True)
class pseudo_inverse(EigenSolver):
    """Inverse root of Moore-Penrose (1955) kind: zero along directions without any gradient.

        A = Q diag(λ) Qᵀ,   X = Q diag(f(λ)) Qᵀ
        f(λ) = λ^(-1/p) if λ > max(rtol·λmax, atol), else 0

    For any p > 0. Residual, condition and gradient are those of the kept eigenspace (the gradient
    at constant rank). If no eigenvalue is kept, as for a zero matrix, the root is zero. LAPACK
    failures, ties and second derivatives are as in `eigh`.

    rtol: None means d times the machine epsilon of A's dtype, the size of eigh's rounding errors.
    The solver's epsilon must be the number 0. Raises ValueError for another epsilon, a negative
    rtol or atol, or p ≤ 0; TypeError for a dtype other than float32 and float64.

    >>> A = torch.diag(torch.tensor([0.0, 16.0]))
    >>> pseudo_inverse()(A, 4, 0.0).root
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = {"rtol": 0, "atol": 0}

    rtol: Hyper | None = None
    atol: float = 0.0

    def from_spectrum(
        self, A: Tensor, spectrum: AnySpectrum, p: float, epsilon: Hyper
    ) -> InverseRoot:
        """See `EigenSolver`."""
        check_undamped(epsilon)
        relative = A.shape[-1] * torch.finfo(A.dtype).eps if self.rtol is None else self.rtol
        if isinstance(relative, Tensor):
            relative = relative.to(A)
        values = spectrum.values
        # Zero is never kept, whatever the tolerances, since it has no inverse.
        keep = values > (relative * values.amax(-1, keepdim=True)).clamp(min=self.atol)
        return inverse_root(A, spectrum, values, keep, p)


def check_undamped(epsilon: Hyper) -> None:
    """Raise for damping of `pseudo_inverse`: where a chain is built, and where it is used."""
    if isinstance(epsilon, Live):  # a later value of it is checked before the step
        epsilon.note(check_undamped)
        epsilon = initial(epsilon)
    if not is_exactly(epsilon, 0):
        made = ", or a number by static_args=['epsilon'] of inject_hyperparams"
        raise ValueError(
            f"epsilon must be the number 0 for pseudo_inverse, got {epsilon!r}: damping would "
            "fill the null space that it leaves out; use eigh() for a damped root"
            + (made if isinstance(epsilon, Tensor) else "")
        )
