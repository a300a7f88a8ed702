"""The root solvers and eigenbases of the Distributed Shampoo reference, from its configs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_range
from funshampoo.core.context import changed
from funshampoo.core.contract import Hyper
from funshampoo.linalg import (
    Basis,
    InverseRoot,
    Solver,
    by_rank,
    coupled_higher_order,
    coupled_newton,
    eigh,
    pseudo_inverse,
)
from funshampoo.linalg.adaptive import qr_algorithm, spectrum_near
from funshampoo.linalg.basis import Renewed
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.solver import add_to_diagonal, total_damping
from funshampoo.linalg.spectral import AnySpectrum, NearSpectrum
from funshampoo.migrate.reference_config import Config, Fields

EIGEN = ("EigenConfig", "EighEigendecompositionConfig")
QR = "QREigendecompositionConfig"
STABILITY = "PerturbationConfig", "PseudoInverseConfig"


def initial_eigenvalue(config: Config | None, epsilon: float) -> float:
    """The eigenvalue whose root EigendecomposedShampoo uses before a refresh: λ = 1, stabilized."""
    stability = (config or {}).get("rank_deficient_stability_config") or {}
    if stability.get("type") == "PseudoInverseConfig":
        return 1.0
    if stability.get("perturb_before_computation", True):
        return max(1.0, epsilon)
    return 1.0 + epsilon


def solver_of(
    config: Config | None, epsilon: float, floor: bool, stores_spectrum: bool
) -> tuple[Solver, float | None]:
    """(solver, basis_tolerance) of `root_inverse`, from an amortized_computation_config.

    Args:
        epsilon: the optimizer's.
        floor: that of `eigh`.
        stores_spectrum: whether the reference has an old eigenbasis to continue from.

    Raises:
        ValueError: the config, or a field of it, does not go with the others.
        NotImplementedError: a config that is not supported here.
    """
    built = (*EIGEN, QR, "CoupledNewtonConfig", "CoupledHigherOrderConfig")
    fields = Fields(config or None, "amortized_computation_config", built)
    tolerance = None
    solver: Solver
    if fields.type == "CoupledNewtonConfig":
        solver = coupled_newton(
            relative_epsilon=0.0,
            max_iterations=fields.take("max_iterations", 100),
            tolerance=fields.take("tolerance", 1e-6),
        )
        fields.drop("rank_deficient_stability_config")
    elif fields.type == "CoupledHigherOrderConfig":
        if not {"rel_epsilon", "abs_epsilon"} <= set(fields.left):
            raise TypeError("CoupledHigherOrderConfig needs rel_epsilon and abs_epsilon.")
        solver = coupled_higher_order(
            relative_epsilon=fields.take("rel_epsilon", 0.0),
            absolute_epsilon=fields.take("abs_epsilon", 0.0),
            max_iterations=fields.take("max_iterations", 100),
            tolerance=fields.take("tolerance", 1e-8),
            order=fields.take("order", 3),
        )
        # TF32 is off unless the process has enabled it: see docs/design.md, "Autocast".
        fields.drop("disable_tf32", "rank_deficient_stability_config")
    else:
        solver, damps = _stable(fields, epsilon, floor)
        renewal = renewal_of(fields, damps)
        if not (renewal.is_plain or stores_spectrum):
            raise ValueError(
                f"{fields.argument}: {fields.type} goes on in an old eigenbasis, which a root that "
                "is kept does not have, there too; give EigendecomposedShampooPreconditionerConfig."
            )
        if not renewal.is_plain:
            solver, tolerance = RenewedSolver(solver, renewal), renewal.tolerance
    fields.finish()
    return solver, tolerance


def _stable(fields: Fields, epsilon: float, floor: bool) -> tuple[EigenSolver, bool]:
    """The solver, and whether the reference decomposes the already damped matrix."""
    stability = fields.nested("rank_deficient_stability_config", *STABILITY)
    if stability.type == "PerturbationConfig":
        # For a decomposition the sum is the same: A + εI has the eigenvalues of A, plus ε.
        before = stability.take("perturb_before_computation", True)
        if not epsilon > 0:
            raise ValueError(
                f"epsilon is {epsilon}; without PseudoInverseConfig it must be above 0."
            )
        return eigh(floor=floor), before
    if epsilon != 0:
        raise ValueError(f"epsilon is {epsilon}; PseudoInverseConfig wants 0.")
    rtol, atol = stability.take("rank_rtol", 0.0), stability.take("rank_atol", 0.0)
    return pseudo_inverse(rtol=rtol, atol=atol), False


def basis_of(config: Config | None, epsilon: Hyper) -> Basis:
    """The basis for `in_eigenbasis`, from eigenvalue correction's amortized_computation_config.

    Raises:
        ValueError: a tolerance outside [0, 1], or PseudoInverseConfig.
        NotImplementedError: a config that is not an eigendecomposition.
    """
    fields = Fields(config or None, "amortized_computation_config", (*EIGEN, QR))
    nested = fields.nested("rank_deficient_stability_config", *STABILITY)
    if nested.type == "PseudoInverseConfig":
        raise ValueError(
            "rank_deficient_stability_config: PseudoInverseConfig is none for eigenvalue-corrected "
            "Shampoo, there too; leave it out, or give PerturbationConfig."
        )
    renewal = renewal_of(fields, nested.take("perturb_before_computation", True))
    fields.finish()
    return by_rank() if renewal.is_plain else RenewedBasis(renewal, epsilon)


@dataclass(frozen=True)
class Renewal:
    """Keep an old basis while it diagonalizes A + damping I well enough; see `spectrum_near`.

    Attributes:
        tolerance: the largest relative off-diagonal norm that is well enough.
        steps: otherwise, steps of the QR algorithm from the old basis; None: a decomposition.
        damps: whether the damping is added beforehand.
    """

    tolerance: float
    steps: int | None
    damps: bool

    @property
    def is_plain(self) -> bool:
        """Whether it is always a decomposition."""
        return self.steps is None and self.tolerance == 0

    def spectrum(self, A: Tensor, old: Tensor, damping: Hyper, tolerance: Hyper) -> NearSpectrum:
        """The spectrum of A itself, perhaps approximate, in the basis found."""
        added = total_damping(A, damping if self.damps else 0.0, 0.0, lambda: A[..., 0, 0])
        damped = add_to_diagonal(A, added) if self.damps else A
        if self.steps is None:
            found = spectrum_near(damped, old, tolerance)
        else:
            found = qr_algorithm(damped, old, tolerance, self.steps)
        return changed(found, values=found.values - added[..., None])


def renewal_of(fields: Fields, damps: bool) -> Renewal:
    """The renewal for an amortized_computation_config by eigendecomposition.

    Raises:
        ValueError: a tolerance outside [0, 1], or with a type whose roots have no basis.
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
    """A `Basis` for `in_eigenbasis` whose columns stay where the reference leaves them.

    It starts from the identity, without an initial decomposition.
    """

    renewal: Renewal
    damping: Hyper

    def __call__(self, A: Tensor, old: Tensor, first: Tensor, begins: bool = False) -> Renewed:
        """See `Basis`."""
        # A coordinate without a gradient until now is in no vector of the old basis.
        lacks = ((old == 0).all(-1) & (A.diagonal(dim1=-2, dim2=-1) != 0)).any(-1)
        tolerance = torch.where(lacks, -1.0, self.renewal.tolerance)
        tolerance = tolerance.reshape(-1) if self.renewal.steps is None else tolerance
        spectrum = self.renewal.spectrum(A, old, self.damping, tolerance)
        return spectrum.vectors, spectrum.decomposed


@dataclass(frozen=True, eq=False)
class RenewedSolver(EigenSolver):
    """A solver by eigendecomposition that continues in the old basis, for `root_inverse`."""

    inner: EigenSolver
    renewal: Renewal

    def renewed(self, A: Tensor, epsilon: Hyper, basis: Tensor, tolerance: Hyper) -> NearSpectrum:
        """See `EigenSolver`."""
        return self.renewal.spectrum(A, basis, epsilon, tolerance)

    def from_spectrum(
        self, A: Tensor, spectrum: AnySpectrum, p: float, epsilon: Hyper
    ) -> InverseRoot:
        """As in `inner`."""
        return self.inner.from_spectrum(A, spectrum, p, epsilon)
