"""How the Distributed Shampoo reference finds an eigenbasis again, from the one before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_range
from funshampoo.core.contract import Hyper
from funshampoo.linalg import Basis, InverseRoot
from funshampoo.linalg.adaptive import qr_algorithm, spectrum_near
from funshampoo.linalg.basis import Renewed
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.solver import Number, add_to_diagonal, total_damping
from funshampoo.linalg.spectral import Spectrum
from funshampoo.migrate.reference_config import Fields

QR = "QREigendecompositionConfig"


@dataclass(frozen=True)
class Renewal:
    """An old basis will do while it diagonalizes A + damping I well enough; see `spectrum_near`.

    Attributes:
        tolerance: what is well enough.
        steps: of the QR algorithm from the old basis, where it does not; None: a decomposition.
        damps: whether the damping is added before.
    """

    tolerance: float
    steps: int | None
    damps: bool

    @property
    def is_plain(self) -> bool:
        """Whether it is a decomposition every time."""
        return self.steps is None and self.tolerance == 0

    def spectrum(
        self, A: Tensor, old: Tensor, damping: Hyper, tolerance: Hyper
    ) -> tuple[Spectrum, Tensor]:
        """(the spectrum of A itself, perhaps approximate; the basis that it is in)."""
        added = total_damping(A, damping if self.damps else 0.0, 0.0, lambda: A[..., 0, 0])
        damped = add_to_diagonal(A, added) if self.damps else A
        if self.steps is None:
            spectrum, basis = spectrum_near(damped, old, tolerance)
        else:
            spectrum = qr_algorithm(damped, old, tolerance, self.steps)
            basis = spectrum.vectors
        return spectrum._replace(values=spectrum.values - added[..., None]), basis


def renewal_of(fields: Fields, damps: bool) -> Renewal:
    """Of an amortized_computation_config by an eigendecomposition.

    Raises:
        ValueError: a tolerance outside of [0, 1], or with a type whose roots have no basis.
    """
    tolerance = fields.take("tolerance", 0.0)
    check_range("tolerance", tolerance, 0.0, 1.0)
    if tolerance and fields.type == "EigenConfig":
        raise ValueError(
            f"{fields.argument}: tolerance is {tolerance}; EigenConfig wants 0, there too, since "
            "a root that is kept has no eigenbasis. Give EigendecomposedShampooPreconditionerConfig"
            " with EighEigendecompositionConfig."
        )
    if fields.type != QR:
        fields.drop("retry_double_precision", "eigendecomposition_offload_device")
        return Renewal(tolerance, None, damps)
    steps = fields.take("max_iterations", 1)
    check_count("max_iterations", steps, least=0)
    return Renewal(tolerance, steps, damps)


@dataclass(frozen=True)
class RenewedBasis(Basis):
    """A `Basis` for `in_eigenbasis`, whose columns stand where the reference leaves them.

    It begins in the identity, and decomposes nothing for the first time alone.
    """

    renewal: Renewal
    damping: Hyper

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        # A coordinate that had no gradient until now is in no vector of the old basis.
        lacks = ((old == 0).all(-1) & (A.diagonal(dim1=-2, dim2=-1) != 0)).any(-1)
        tolerance = torch.where(lacks, -1.0, self.renewal.tolerance)
        tolerance = tolerance.reshape(-1) if self.renewal.steps is None else tolerance
        spectrum, basis = self.renewal.spectrum(A, old, self.damping, tolerance)
        return basis, spectrum.decomposed


@dataclass(frozen=True, eq=False)
class RenewedSolver(EigenSolver):
    """A solver by eigendecomposition that goes on in the old basis, for `root_inverse`."""

    inner: EigenSolver
    renewal: Renewal

    def renewed(
        self, A: Tensor, epsilon: Number, basis: Tensor, tolerance: Number
    ) -> tuple[Spectrum, Tensor]:
        """See `EigenSolver`."""
        return self.renewal.spectrum(A, basis, epsilon, tolerance)

    def from_spectrum(
        self, A: Tensor, spectrum: Spectrum, p: float, epsilon: Number
    ) -> InverseRoot:
        """As `inner` does."""
        return self.inner.from_spectrum(A, spectrum, p, epsilon)

    def check_epsilon(self, epsilon: Number) -> None:
        """As `inner` does."""
        self.inner.check_epsilon(epsilon)
