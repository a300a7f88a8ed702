"""The root solvers of the Distributed Shampoo reference, from its configs."""

from __future__ import annotations

from funshampoo.linalg import (
    Solver,
    coupled_higher_order,
    coupled_newton,
    eigh,
    pseudo_inverse,
)
from funshampoo.migrate.reference_config import Config, Fields


def initial_eigenvalue(config: Config | None, epsilon: float) -> float:
    """What EigendecomposedShampoo takes roots of before its first refresh: λ = 1, stabilized."""
    stability = (config or {}).get("rank_deficient_stability_config") or {}
    if stability.get("type") == "PseudoInverseConfig":
        return 1.0
    if stability.get("perturb_before_computation", True):
        return max(1.0, epsilon)
    return 1.0 + epsilon


def solver_of(config: Config | None, epsilon: float, floor: bool) -> Solver:
    """Of an amortized_computation_config; epsilon is the optimizer's, floor that of `eigh`."""
    built = (
        "EigenConfig",
        "EighEigendecompositionConfig",
        "CoupledNewtonConfig",
        "CoupledHigherOrderConfig",
    )
    fields = Fields(config or {"type": "EigenConfig"}, "amortized_computation_config", built)
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
        solver = _eigen(fields, epsilon, floor)
    fields.finish()
    return solver


def _eigen(fields: Fields, epsilon: float, floor: bool) -> Solver:
    drop_of_eigen(fields)
    stability = Fields(
        fields.take("rank_deficient_stability_config", None) or {"type": "PerturbationConfig"},
        "rank_deficient_stability_config",
        ("PerturbationConfig", "PseudoInverseConfig"),
    )
    if stability.type == "PerturbationConfig":
        # Before or after eigh is the same sum: the eigenvalues of A + εI are those of A, plus ε.
        stability.drop("perturb_before_computation")
        stability.finish()
        if not epsilon > 0:
            raise ValueError(
                f"epsilon is {epsilon}; without PseudoInverseConfig it must be above 0."
            )
        return eigh(floor=floor)
    if epsilon != 0:
        raise ValueError(f"epsilon is {epsilon}; PseudoInverseConfig wants 0.")
    rtol, atol = stability.take("rank_rtol", 0.0), stability.take("rank_atol", 0.0)
    stability.finish()
    return pseudo_inverse(rtol=rtol, atol=atol)


def drop_of_eigen(fields: Fields) -> None:
    """What an eigendecomposition has no use for here; raises for what it can't do."""
    fields.drop("retry_double_precision", "eigendecomposition_offload_device")
    if fields.take("tolerance", 0.0) != 0.0:
        raise NotImplementedError(
            "amortized_computation_config: tolerance (adaptive refresh) is not built here yet."
        )
