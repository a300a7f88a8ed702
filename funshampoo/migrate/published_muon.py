"""The published variants of Muon, from their constructors' arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import partition
from funshampoo.core.checks import check_choice, check_range, chosen
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.tree import map_leaves
from funshampoo.operators.shape_scale import SCALES, Scale
from funshampoo.recipes.routing import decay, whole
from funshampoo.transforms import (
    add_cautious_decay,
    add_decayed_weights,
    ema,
    normalize_rows,
    orthogonalize,
    scale,
    scale_by_learning_rate,
    trace,
)


def on_matrices(*stages: GradientTransformation) -> GradientTransformation:
    """The stages on stacks of whole matrices; a matrix with a non-finite gradient is held."""
    return whole(chain(*stages), 20, None)


def keller_jordan(
    *,
    lr: Hyper | Schedule = 0.02,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    as_published: bool = True,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Muon of KellerJordan/Muon.

    For a kernel of four sides it orthogonalizes the matrix (out, the rest), and scales by the
    kernel's height and width; with as_published=False, by that matrix. A tensor of order 3 is a
    stack of matrices, and so is one of order 5 or more unless as_published=False. A gradient of
    None leaves its parameter alone; there it counts as zeros, so that momentum and decay go on.
    """

    def by_last_two(shape: tuple[int, ...]) -> float:
        return math.sqrt(max(1.0, shape[-2] / shape[-1]))

    def steps_of(flat: bool) -> GradientTransformation:
        return on_matrices(
            ema(momentum, nesterov=nesterov, bias_correction=False),
            orthogonalize(
                steps=ns_steps,
                scale=by_last_two if as_published else "muon",
                dtype=dtype,
                norm="added",
                flatten_sides=flat,
            ),
            *decay(weight_decay),
            scale_by_learning_rate(lr),
        )

    def kind(p: Any) -> str:
        order = 2 if p is None else p.ndim
        return "stacks" if order == 3 or (as_published and order > 4) else "flat"

    parts = {"flat": steps_of(True), "stacks": steps_of(False)}
    return partition(parts, lambda tree: map_leaves(kind, tree))


def torch_optim(
    *,
    lr: Hyper | Schedule = 1e-3,
    weight_decay: Hyper = 0.1,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """torch.optim.Muon."""
    a, b, c = ns_coefficients
    fit = chosen(
        "adjust_lr_fn", adjust_lr_fn, {None: "muon", "original": "muon", "match_rms_adamw": "adam"}
    )
    return on_matrices(
        ema(momentum, nesterov=nesterov, bias_correction=False),
        orthogonalize([(a, b, c)], ns_steps, scale=fit, epsilon=eps, dtype=dtype),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


_NVIDIA_SETS = {
    "simple": "newton_schulz",
    "quintic": "quintic",
    "polar_express": "polar_express_8",
    "cans": "cans",
    "aol": "aol",
    "deepseekv4": "deepseek",
}
_NVIDIA_SCALES = {"shape_scaling": "muon", "spectral": "spectral", "unit_rms_norm": "unit_rms"}


def emerging_optimizers(
    *,
    lr: Hyper | Schedule = 3e-4,
    momentum: Hyper = 0.95,
    weight_decay: Hyper = 0.01,
    nesterov: bool = False,
    weight_decay_method: str = "decoupled",
    fp32_matmul_prec: str = "medium",
    coefficient_type: str = "quintic",
    num_ns_steps: int = 5,
    scale_mode: str = "spectral",
    extra_scale_factor: float = 1.0,
    use_syrk: bool = False,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Muon of NVIDIA-NeMo/Emerging-Optimizers.

    fp32_matmul_prec and use_syrk have no effect here: products are as precise as dtype.
    """
    check_range("extra_scale_factor", extra_scale_factor, 0.0)
    factor = SCALES[chosen("scale_mode", scale_mode, _NVIDIA_SCALES)]

    def fit(shape: tuple[int, ...]) -> float:
        r, c = shape
        return extra_scale_factor * factor(r, c)

    direction = [
        ema(momentum, nesterov=nesterov, bias_correction=False),
        orthogonalize(
            chosen("coefficient_type", coefficient_type, _NVIDIA_SETS),
            num_ns_steps,
            scale=fit,
            epsilon=1e-15,
            dtype=dtype,
        ),
    ]
    before, after = decayed(weight_decay_method, weight_decay, lr)
    return on_matrices(*before, *direction, *after)


def decayed(
    weight_decay_method: str, weight_decay: Hyper, lr: Hyper | Schedule
) -> tuple[list[GradientTransformation], list[GradientTransformation]]:
    """The stages of NVIDIA's weight decay: before the direction, and after it, with the step."""
    kinds = ("decoupled", "independent", "l2")
    check_choice("weight_decay_method", weight_decay_method, kinds)
    step = scale_by_learning_rate(lr)
    if weight_decay_method == "l2":
        return [add_decayed_weights(weight_decay, kind="coupled")], [step]
    if weight_decay_method == "decoupled":
        return [], [*decay(weight_decay), step]
    up = scale_by_learning_rate(lr, flip_sign=False)
    return [], [up, *decay(weight_decay), scale(-1.0)]


def dion(
    *,
    lr: Hyper | Schedule = 0.01,
    mu: Hyper = 0.95,
    muon_beta2: Hyper = 0.95,
    betas: Any = None,
    weight_decay: Hyper = 0.01,
    cautious_wd: bool = False,
    epsilon: float = 1e-8,
    nesterov: bool = False,
    adjust_lr: str | None = "spectral_norm",
    flatten: bool = False,
    use_gram_newton_schulz: bool = False,
    use_triton: bool = False,
    use_polar_express: bool = True,
    newton_schulz_func: Any = None,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """NorMuon of microsoft/dion, on one device.

    betas are those of its AdamW for other parameters; use_triton has no effect here. With flatten,
    the original orthogonalizes two or more parameters of one shape together, by mistake, as rows of
    one matrix; here each is its own matrix, whatever the others' shapes.
    """
    if newton_schulz_func is not None:
        raise NotImplementedError(
            "newton_schulz_func is not built here; orthogonalize(polynomials=...) takes (a, b, c) "
            "of each step."
        )
    fits = {"spectral_norm": "unit_rms", "rms_norm": "adam", None: None}
    fit = chosen("adjust_lr", adjust_lr, fits)

    def by_matrix(shape: tuple[int, ...]) -> float:
        r, c = (shape[0], math.prod(shape[1:])) if flatten else shape[-2:]
        return SCALES[fit](r, c)

    by_shape: Scale = None if fit is None else by_matrix
    decays = [add_cautious_decay(weight_decay)] if cautious_wd else decay(weight_decay)
    return on_matrices(
        trace(mu, nesterov=nesterov),
        orthogonalize(
            "polar_express" if use_polar_express else "quintic",
            scale=None,
            epsilon=epsilon,
            norm="added",
            slack=1.02 if use_polar_express else 1.0,
            flatten_sides=flatten,
            gram=use_gram_newton_schulz,
            dtype=dtype,
        ),
        normalize_rows(muon_beta2, scale=by_shape, flatten_sides=False),
        *decays,
        scale_by_learning_rate(lr),
    )
