"""The root solvers of the Distributed Shampoo reference, from its configs."""

from __future__ import annotations

from funshampoo.core.contract import Hyper
from funshampoo.linalg import (
    Basis,
    Solver,
    by_rank,
    coupled_higher_order,
    coupled_newton,
    eigh,
    pseudo_inverse,
)
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.migrate.reference_bases import QR, RenewedBasis, RenewedSolver, renewal_of
from funshampoo.migrate.reference_config import Config, Fields

EIGEN = ("EigenConfig", "EighEigendecompositionConfig")


def initial_eigenvalue(config: Config | None, epsilon: float) -> float:
    """What EigendecomposedShampoo takes roots of before its first refresh: λ = 1, stabilized."""
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
        stores_spectrum: whether there is an old eigenbasis to go on from, in the reference.

    Raises:
        ValueError: the config, or a field of it, does not go with the others.
        NotImplementedError: a config that is not built here.
    """
    built = (*EIGEN, QR, "CoupledNewtonConfig", "CoupledHigherOrderConfig")
    fields = Fields(config or {"type": "EigenConfig"}, "amortized_computation_config", built)
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
        # TF32 is off unless the process has asked for it: see docs/design.md, "Autocast".
        fields.drop("disable_tf32", "rank_deficient_stability_config")
    else:
        solver, tolerance = _eigen(fields, epsilon, floor, stores_spectrum)
    fields.finish()
    return solver, tolerance


def _eigen(
    fields: Fields, epsilon: float, floor: bool, stores_spectrum: bool
) -> tuple[Solver, float | None]:
    solver, damps = _stable(fields, epsilon, floor)
    renewal = renewal_of(fields, damps)
    if renewal.is_plain:
        return solver, None
    if not stores_spectrum:
        raise ValueError(
            f"{fields.argument}: {fields.type} goes on in an old eigenbasis, which a root that is "
            "kept does not have, there too; give EigendecomposedShampooPreconditionerConfig."
        )
    assert isinstance(solver, EigenSolver)
    return RenewedSolver(solver, renewal), renewal.tolerance


def _stable(fields: Fields, epsilon: float, floor: bool) -> tuple[Solver, bool]:
    """The solver, and whether the reference decomposes what is damped already."""
    stability = Fields(
        fields.take("rank_deficient_stability_config", None) or {"type": "PerturbationConfig"},
        "rank_deficient_stability_config",
        ("PerturbationConfig", "PseudoInverseConfig"),
    )
    if stability.type == "PerturbationConfig":
        # For a decomposition it is the same sum: the eigenvalues of A + εI are those of A, plus ε.
        before = stability.take("perturb_before_computation", True)
        stability.finish()
        if not epsilon > 0:
            raise ValueError(
                f"epsilon is {epsilon}; without PseudoInverseConfig it must be above 0."
            )
        return eigh(floor=floor), before
    if epsilon != 0:
        raise ValueError(f"epsilon is {epsilon}; PseudoInverseConfig wants 0.")
    rtol, atol = stability.take("rank_rtol", 0.0), stability.take("rank_atol", 0.0)
    stability.finish()
    return pseudo_inverse(rtol=rtol, atol=atol), False


def basis_of(config: Config | None, epsilon: Hyper) -> Basis:
    """Of `in_eigenbasis`, from the amortized_computation_config of eigenvalue correction.

    Raises:
        ValueError: a tolerance outside of [0, 1], or PseudoInverseConfig.
        NotImplementedError: a config that is no eigendecomposition.
    """
    default = {"type": "EighEigendecompositionConfig"}
    fields = Fields(config or default, "amortized_computation_config", (*EIGEN, QR))
    stability = fields.take("rank_deficient_stability_config", None) or {}
    if stability.get("type") == "PseudoInverseConfig":
        raise ValueError(
            "rank_deficient_stability_config: PseudoInverseConfig is none for eigenvalue-corrected "
            "Shampoo, there too; leave it out, or give PerturbationConfig."
        )
    kind = "PerturbationConfig"
    nested = Fields(stability or {"type": kind}, "rank_deficient_stability_config", (kind,))
    renewal = renewal_of(fields, nested.take("perturb_before_computation", True))
    nested.finish()
    fields.finish()
    return by_rank() if renewal.is_plain else RenewedBasis(renewal, epsilon)
