"""Errors about an argument name it as the constructor does that has it, whoever raises them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest

import funshampoo as fs
from funshampoo.migrate.published import METHODS

ANYTHING = {  # what has nothing to do here, or is a function, a note or a dtype
    "foreach",
    "fp32_matmul_prec",
    "qr_fp32_matmul_prec",
    "stream_list",
    "use_triton",
    "use_syrk",
    "roles",
    "NorMuon.betas",
}
METHOD_ARGUMENTS = [
    (method, name)
    for method, build in METHODS.items()
    for name in inspect.signature(build).parameters
    if not {name, f"{method}.{name}"} & ANYTHING
]


@pytest.mark.parametrize(("method", "name"), METHOD_ARGUMENTS)
def test_no_argument_of_a_published_method_is_taken_for_something(method: str, name: str) -> None:
    wrong: list[Any] = [math.nan, "x", 1j]
    wrong += [(0.9, math.nan), (math.nan, 0.9)] if name == "betas" else []
    for value in wrong:
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=rf"\b{name}\b"):
            fs.from_published(method, **{name: value})


FIELDS: dict[str, tuple[str, ...]] = {
    "grafting_config.Adam": ("beta2", "epsilon", "drop_weighting_factor_on_gsquare"),
    "iterate_averaging_config.ClassicMomentum": ("momentum", "dampening", "use_nesterov"),
    "iterate_averaging_config.GeneralizedPrimalAveraging": (
        "eval_interp_coeff",
        "train_interp_coeff",
    ),
    "iterate_averaging_config.ScheduleFree": ("train_interp_coeff", "eval_coeff_lr_power"),
    "preconditioner_config.RootInvShampoo": ("use_trace_scaling", "inverse_exponent_override"),
    "preconditioner_config.EigenvalueCorrectedShampoo": (
        "inverse_exponent_override",
        "ignored_basis_change_dims",
    ),
    "preconditioner_config.SignDescent": ("scale_fn",),
    "amortized_computation_config.CoupledNewton": ("max_iterations", "tolerance"),
    "amortized_computation_config.CoupledHigherOrder": (
        "rel_epsilon",
        "abs_epsilon",
        "max_iterations",
        "tolerance",
        "order",
    ),
    "orthogonalization_config.NewtonSchulzOrthogonalization": (
        "coefficients",
        "num_iterations",
        "scale_by_dims_fn",
    ),
    "rank_deficient_stability_config.PseudoInverse": ("rank_atol", "rank_rtol"),
}


def _with_field(place: str, field: str, value: Any) -> dict[str, Any]:
    """Arguments of `from_reference` with this in a config, and what has to go with it."""
    argument, kind = place.split(".")
    suffix = (
        "PreconditionerConfig" if argument in ("grafting_config", "preconditioner_config") else ""
    )
    config = {"type": kind + (suffix or "Config"), field: value}
    outer: dict[str, Any] = {}
    if kind == "CoupledHigherOrder":
        config = {"rel_epsilon": 0.0, "abs_epsilon": 1e-6, **config}
    if argument == "rank_deficient_stability_config":
        outer, config = {"epsilon": 0.0}, {"type": "EigenConfig", argument: config}
        argument = "amortized_computation_config"
    parents = {
        "amortized_computation_config": "RootInvShampooPreconditionerConfig",
        "orthogonalization_config": "SpectralDescentPreconditionerConfig",
    }
    if argument in parents:
        config = {"type": parents[argument], argument: config}
        argument = "preconditioner_config"
    return {**outer, argument: config}


@pytest.mark.parametrize(
    ("place", "field"), [(place, field) for place in FIELDS for field in FIELDS[place]]
)
def test_no_field_of_a_config_is_taken_for_something(place: str, field: str) -> None:
    for value in (math.nan, "x", 1j):
        with pytest.raises((ValueError, TypeError), match=rf"\b{field}\b"):
            fs.from_reference(**_with_field(place, field, value))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, known in inspect.signature(fs.from_reference).parameters.items()
        if known.kind is not known.VAR_KEYWORD
    ],
)
def test_no_argument_of_the_reference_is_taken_for_something(name: str) -> None:
    for value in (math.nan, "x", 1j):
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
            fs.from_reference(**{name: value})


def test_it_is_the_argument_at_fault_that_is_named() -> None:
    """Not one that is as good as it was, nor one whose name a stage has for another."""
    with pytest.raises(ValueError, match="^shampoo_beta: beta2 is -1.0"):
        fs.from_published("KL-SOAP-H (hyperball)", beta2=0.5, shampoo_beta=-1.0)
    with pytest.raises(ValueError, match="^betas: beta2 is 1.0"):
        fs.from_published("REKLS", eps=0.1, shampoo_beta=0.5, betas=(0.9, 1.0))
    config = {"use_trace_scaling": True, "trace_scaling_exponent": 2.0}
    config["type"] = "RootInvShampooPreconditionerConfig"
    with pytest.raises(ValueError, match="^trace_scaling_exponent: trace_scaling is 2.0"):
        fs.from_reference(lr=0.1, preconditioner_config=config)
    with pytest.raises(ValueError, match="^lookahead_ema: beta is 1.0"):
        fs.from_published("SOAP-Muon", mu=0.5, lookahead={"rest_steps": 3, "lookahead_ema": 1.0})
