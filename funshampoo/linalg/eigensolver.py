"""Solvers that need an eigendecomposition and nothing else of a matrix."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.linalg.adaptive import spectrum_near
from funshampoo.linalg.solver import InverseRoot, RootSolver, check_exponent, check_matrix
from funshampoo.linalg.spectral import Spectrum, decompose


class EigenSolver(RootSolver):
    """A `RootSolver` whose one expensive part is an eigendecomposition, or what takes its place."""

    threaded: ClassVar[bool] = True

    def __call__(self, A: Tensor, p: float, epsilon: float | Tensor = 0.0) -> InverseRoot:
        """A^(-1/p), with a new eigendecomposition."""
        self._check(A, p, epsilon)
        spectrum = decompose(A)  # no products, and perhaps long: other threads need not wait
        with full_precision():
            return self.from_spectrum(A, spectrum, p, epsilon)

    def near_basis(
        self,
        A: Tensor,
        p: float,
        epsilon: float | Tensor,
        basis: Tensor,
        tolerance: float | Tensor,
    ) -> tuple[InverseRoot, Tensor]:
        """A^(-1/p), and the basis it is computed in: the one given, where that is good enough.

        Args:
            A: (..., d, d).
            p, epsilon: as ever.
            basis: (..., d, d), orthogonal: eigenvectors of an earlier A as columns.
            tolerance: see `spectrum_near`.
        """
        self._check(A, p, epsilon)
        spectrum, basis = spectrum_near(A, basis, tolerance)
        with full_precision():
            return self.from_spectrum(A, spectrum, p, epsilon), basis

    @abstractmethod
    def from_spectrum(
        self, A: Tensor, spectrum: Spectrum, p: float, epsilon: float | Tensor
    ) -> InverseRoot:
        """A^(-1/p) by a spectrum of A, exact or approximate, in any order."""

    def check_epsilon(self, epsilon: float | Tensor) -> None:
        """Raise for an epsilon that this solver can't take."""

    def _check(self, A: Tensor, p: float, epsilon: float | Tensor) -> None:
        check_matrix(A)
        check_exponent(p)
        self.check_epsilon(epsilon)
