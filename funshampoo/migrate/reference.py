"""The arguments of the Distributed Shampoo reference implementation, as a chain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.layout import Merge
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.live import initial, is_exactly
from funshampoo.linalg import (
    Solver,
    coupled_higher_order,
    coupled_newton,
    eigh,
    pseudo_inverse,
)
from funshampoo.migrate.reference_kl import kl_by_roots
from funshampoo.recipes.shampoo import shampoo
from funshampoo.transforms import scale_by_adagrad, scale_by_adam, scale_by_rms, scale_by_sgd
from funshampoo.transforms.weight_decay import DecayKind

Config = Mapping[str, Any]

_DECAY_KINDS: dict[str, DecayKind] = {
    "L2": "coupled",
    "DECOUPLED": "decoupled",
    "CORRECTED": "corrected",
    "INDEPENDENT": "independent",
}
_SHAMPOO_TYPES = (
    "RootInvShampooPreconditionerConfig",
    "EigendecomposedShampooPreconditionerConfig",
    "RootInvKLShampooPreconditionerConfig",
    "EigendecomposedKLShampooPreconditionerConfig",
)
# What the reference accepts and a chain has no use for: dtypes follow the parameters here, failed
# roots are counted in the state, and symmetric storage is not arithmetic.
_WITHOUT_EFFECT = (
    "factor_matrix_dtype",
    "inv_factor_matrix_dtype",
    "factor_matrix_eigenvectors_dtype",
    "factor_matrix_eigenvalues_dtype",
    "num_tolerated_failed_amortized_computations",
    "use_symmetric_packing",
)


def from_reference(
    *,
    lr: Hyper | Schedule = 1e-2,
    betas: tuple[Hyper, Hyper] = (0.9, 1.0),
    beta3: float = -1.0,
    epsilon: Hyper = 1e-12,
    weight_decay: Hyper = 0.0,
    weight_decay_type: str = "DECOUPLED",
    max_preconditioner_dim: int | float | str = 1024,
    precondition_frequency: int = 1,
    start_preconditioning_step: int | float | str = -1,
    use_bias_correction: bool = True,
    target_parameter_dimensionality: int | float | str = 1,
    grafting_config: Config | None = None,
    iterate_averaging_config: Config | None = None,
    preconditioner_config: Config | None = None,
    peak_lr: Hyper | None = None,
    group_steps: bool = True,
    floor: bool = True,
    **without_effect: Any,
) -> GradientTransformation:
    """The chain that computes what `DistributedShampoo(params, ...)` computes.

    Arguments have the reference's names, defaults and meanings; a config object is written as
    {"type": class name, field: value}, and a field left out has its default there. peak_lr,
    group_steps and floor are ours.

    Args:
        lr: number, or schedule of the old step count in place of a scheduler.
        betas: (of the gradient filter, of the statistics).
        beta3: -1 means betas[0].
        weight_decay_type: "L2", "DECOUPLED", "CORRECTED" or "INDEPENDENT". Decoupled kinds pass
            through the momentum.
        max_preconditioner_dim, target_parameter_dimensionality: an int or "inf".
        start_preconditioning_step: -1 means precondition_frequency; "inf" or math.inf means never.
        grafting_config: SGD-, Adam-, RMSprop-, AdaGradPreconditionerConfig, or None.
        iterate_averaging_config: ClassicMomentumConfig, or None.
        preconditioner_config: RootInvShampoo-, EigendecomposedShampoo-, RootInvKLShampoo- or
            EigendecomposedKLShampooPreconditionerConfig, with amortized_computation_config
            EigenConfig, EighEigendecompositionConfig, CoupledNewtonConfig or
            CoupledHigherOrderConfig.
        peak_lr: what "CORRECTED" and "INDEPENDENT" decay divide by: the constructor's lr there.
            Needed here only with a schedule whose largest value in its first 10,000 steps is not
            it.
        group_steps: True corrects biases by everyone's steps, as the reference does. False counts
            each parameter's own gradients, which is right for one whose gradient is None at times.
        **without_effect: distributed_config (but for its target_parameter_dimensionality),
            shampoo_runtime_config, concurrency_config, shampoo_pt2_compile_config and
            use_pin_memory are accepted and have nothing to do here.
        floor: eigenvalues below 0 are 0 before epsilon is added. False shifts the whole spectrum by
            the smallest, as the reference does where that is below epsilon.

    Where we differ on purpose: an iteration that did not converge is not used; a root of zero
    statistics is the identity; Adam and RMSprop grafting with beta2 = 1, whose second moment stays
    0 there, are an error.

    Raises:
        ValueError: an argument out of the reference's range.
        NotImplementedError: a method that is not built here yet, named.
        TypeError: an unknown argument or field.

    >>> tx = from_reference(lr=1e-3, betas=(0.9, 0.99), precondition_frequency=10,
    ...                     grafting_config={"type": "AdamPreconditionerConfig", "beta2": 0.99})
    """
    beta1, beta2 = betas
    target = _target(target_parameter_dimensionality, without_effect)
    start = _start(start_preconditioning_step, precondition_frequency)
    if start < precondition_frequency:
        raise ValueError(
            f"start_preconditioning_step is {start}; the reference demands at least "
            f"precondition_frequency, {precondition_frequency}."
        )
    kind = _DECAY_KINDS.get(getattr(weight_decay_type, "name", weight_decay_type))
    if kind is None:
        raise ValueError(
            f"weight_decay_type is {weight_decay_type!r}; expected one of {list(_DECAY_KINDS)}."
        )
    if kind in ("corrected", "independent") and peak_lr is None:
        peak_lr = _peak(lr)
    config = _Fields(
        preconditioner_config or {"type": _SHAMPOO_TYPES[0]},
        "preconditioner_config",
        _SHAMPOO_TYPES,
    )
    config.drop(*_WITHOUT_EFFECT)
    scaled = config.take("use_trace_scaling", False)
    exponent = config.take("trace_scaling_exponent", 0.5)
    averaging = _momentum(iterate_averaging_config)
    block, merge, keep = _blocking(max_preconditioner_dim, target)
    amortized = config.take("amortized_computation_config", None)
    stored_spectrum = config.type.startswith("Eigendecomposed")
    build = kl_by_roots if "KL" in config.type else shampoo
    chain = build(
        lr,
        beta1=beta1,
        beta2=beta2,
        beta3=None if beta3 == -1.0 or is_exactly(beta1, 0) else beta3,
        epsilon=epsilon,
        every=precondition_frequency,
        start=start,
        max_size=block,
        merge=merge,
        keep=keep,
        grafting=_grafting(grafting_config, own_steps=not group_steps),
        vectors="blocks",
        weight_decay=weight_decay,
        weight_decay_kind=kind,
        decay_through_momentum=True,
        peak_learning_rate=peak_lr,
        bias_correction=use_bias_correction,
        weighted=not config.take("drop_weighting_factor_on_gsquare", False),
        exponents=config.take("inverse_exponent_override", None),
        trace_scaling=exponent if scaled else None,
        solver=_solver(amortized, initial(epsilon), floor),
        initial_eigenvalue=_initial_eigenvalue(amortized, initial(epsilon))
        if stored_spectrum
        else 1.0,
        own_steps=not group_steps,
        **averaging,
    )
    config.finish()
    return chain


class _Fields:
    """The fields of one config, taken one by one; what is left over is an error."""

    def __init__(self, config: Config, argument: str, built: tuple[str, ...]) -> None:
        self.argument = argument
        self.left = dict(config)
        self.type = str(self.left.pop("type", ""))
        if self.type not in built:
            raise NotImplementedError(
                f"{argument}: {self.type or 'a config without a type'} is not built here yet; "
                f"built are {', '.join(built)}."
            )

    def take(self, field: str, default: Any) -> Any:
        return self.left.pop(field, default)

    def drop(self, *fields: str) -> None:
        for field in fields:
            self.left.pop(field, None)

    def finish(self) -> None:
        if self.left:
            raise TypeError(f"{self.argument}: {self.type} has no field {sorted(self.left)[0]!r}.")


def _grafting(config: Config | None, own_steps: bool) -> GradientTransformation | None:
    if config is None:
        return None
    names = ("SGD", "AdaGrad", "RMSprop", "Adam")
    fields = _Fields(config, "grafting_config", tuple(f"{n}PreconditionerConfig" for n in names))
    method = fields.type.removesuffix("PreconditionerConfig")
    if method == "SGD":
        partner = scale_by_sgd()
    else:
        epsilon = fields.take("epsilon", 1e-10)
        if method == "AdaGrad":
            partner = scale_by_adagrad(epsilon)
        else:
            beta2 = fields.take("beta2", 0.999 if method == "Adam" else 0.99)
            weighted = not fields.take("drop_weighting_factor_on_gsquare", False)
            partner = _exponential(method, beta2, epsilon, weighted, own_steps)
    fields.finish()
    return partner


def _exponential(
    method: str, beta2: float, epsilon: float, weighted: bool, own_steps: bool
) -> GradientTransformation:
    if beta2 == 1 and not weighted:
        return scale_by_adagrad(epsilon)  # V ← V + G²
    if beta2 == 1:
        raise ValueError(
            f"grafting_config: {method} with beta2=1 weighs every G² by 1 - beta2 = 0, so that its "
            "second moment stays 0; AdaGradPreconditionerConfig is the plain sum."
        )
    if method == "Adam":
        return scale_by_adam(0.0, beta2, epsilon, weighted=weighted, own_steps=own_steps)
    return scale_by_rms(beta2, epsilon, weighted=weighted)


def _momentum(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    fields = _Fields(config, "iterate_averaging_config", ("ClassicMomentumConfig",))
    check_range("momentum", fields.left.get("momentum", 0.5), 0, 1, low_open=True, high_open=True)
    momentum = {
        "momentum": fields.take("momentum", 0.5),
        "dampening": fields.take("dampening", 0.0),
        "nesterov": fields.take("use_nesterov", False),
    }
    fields.finish()
    return momentum


def _start(start: int | float | str, frequency: int) -> int:
    if start == -1:
        return frequency
    return sys.maxsize if float(start) == float("inf") else int(start)


def _target(target: int | float | str, without_effect: dict[str, Any]) -> int | float | str:
    """The merging target, which the reference keeps in its distributed_config."""
    unknown = set(without_effect) - {
        "distributed_config",
        "shampoo_runtime_config",
        "concurrency_config",
        "shampoo_pt2_compile_config",
        "use_pin_memory",
    }
    if unknown:
        raise TypeError(f"from_reference() got an unexpected argument {sorted(unknown)[0]!r}.")
    config = without_effect.get("distributed_config") or {}
    found: int | float | str = config.get("target_parameter_dimensionality", target)
    return found


def _blocking(size: int | float | str, target: int | float | str) -> tuple[int | None, Merge, int]:
    """(max_size, merge, keep) of `blocked`."""
    block = _int_or_none("max_preconditioner_dim", size)
    keep = _int_or_none("target_parameter_dimensionality", target)
    return (block, "none", 1) if keep is None else (block, "small", keep)


def _int_or_none(name: str, value: int | float | str) -> int | None:
    if float(value) == float("inf"):
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1, or 'inf'.")
    return value


def _initial_eigenvalue(config: Config | None, epsilon: float) -> float:
    """What EigendecomposedShampoo takes roots of before its first refresh: λ = 1, stabilized."""
    stability = (config or {}).get("rank_deficient_stability_config") or {}
    if stability.get("type") == "PseudoInverseConfig":
        return 1.0
    if stability.get("perturb_before_computation", True):
        return max(1.0, epsilon)
    return 1.0 + epsilon


def _solver(config: Config | None, epsilon: float, floor: bool) -> Solver:
    built = (
        "EigenConfig",
        "EighEigendecompositionConfig",
        "CoupledNewtonConfig",
        "CoupledHigherOrderConfig",
    )
    fields = _Fields(config or {"type": "EigenConfig"}, "amortized_computation_config", built)
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


def _eigen(fields: _Fields, epsilon: float, floor: bool) -> Solver:
    fields.drop("retry_double_precision", "eigendecomposition_offload_device")
    if fields.take("tolerance", 0.0) != 0.0:
        raise NotImplementedError(
            "amortized_computation_config: tolerance (adaptive refresh) is not built here yet."
        )
    stability = _Fields(
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


def _peak(lr: Hyper | Schedule) -> Hyper:
    """The constructor's lr: lr itself, or the largest value that a schedule has early on."""
    if not callable(lr):
        constant: Hyper = initial(lr)  # whatever lr is later
        return constant
    return max(_values(lr, 10_000))


def _values(schedule: Callable[[Tensor], Hyper], steps: int) -> list[float]:
    values = []
    for count in range(steps):
        try:
            values.append(float(schedule(torch.tensor(count, device="cpu"))))
        except (IndexError, KeyError):  # a schedule that reads from a list of rates
            break
    if not values:
        raise ValueError("lr is a schedule without a value at count 0.")
    return values
