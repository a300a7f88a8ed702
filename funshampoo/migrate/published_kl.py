"""KL-Shampoo and KL-SOAP as published, by their constructors' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from funshampoo.combinators.chaining import chain
from funshampoo.core.checks import check_count, check_flag
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import orthogonal_iteration
from funshampoo.migrate.published_muon import on_matrices
from funshampoo.migrate.published_soap import decayed_steps, unit_rms
from funshampoo.operators.kl import clamped_at
from funshampoo.recipes.routing import whole
from funshampoo.transforms import (
    ema,
    hyperball,
    in_eigenbasis,
    kl_statistics,
    scale_by_eigenvalues,
    scale_by_rms,
)


def kl_methods(
    *,
    lr: Hyper | Schedule = 1e-4,
    betas: Sequence[float] = (0.9, 0.98),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    using_klsoap: bool = False,
    normalize_grads: bool = False,
    init_factor: float = 0.1,
    using_damping: bool = False,
    using_clamping: bool = True,
    max_clamp_value: int = 4000,
    cast_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """KLOpt of yorkerlin/KL-Methods.

    Sides of one entry are dropped, as there; vectors and four sides or more, on which it fails, are
    blocks like all others. cast_dtype, bfloat16 by default there, is that of gradients, moments,
    statistics and bases, each rounded at every step by the kernels that torch.compile makes of
    them: no numbers that another implementation has again. None here is float32 at least.
    """
    if cast_dtype in (torch.bfloat16, torch.float16):
        raise NotImplementedError(
            f"cast_dtype {cast_dtype}: what is kept is in float32 at least here, since an average "
            "in half precision loses gradients that are small beside it; leave it out."
        )
    check_flag("using_klsoap", using_klsoap)
    check_count("max_clamp_value", max_clamp_value)
    beta1, beta2 = betas
    ratio = scale_by_rms(beta2, eps) if using_klsoap else scale_by_eigenvalues(eps)
    statistics = kl_statistics(
        beta2 if shampoo_beta < 0 else shampoo_beta,
        initial_eigenvalue=init_factor,
        least_eigenvalue=clamped_at(max_clamp_value) if using_clamping else 0.0,
        damping=eps if using_damping else 0.0,
        in_turn=True,
    )
    turned = _turned(beta1, ratio, precondition_frequency)
    normalized = [unit_rms()] if normalize_grads else []
    inner = chain(statistics, turned, *normalized, *decayed_steps(lr, weight_decay))
    return whole(inner, 20, None, merge=_squeezed)


def klsoap_h(
    *,
    lr: Hyper | Schedule = 0.018,
    beta1: float = 0.9,
    beta2: float = 0.9,
    shampoo_beta: float = 0.9,
    eps: float = 1e-8,
    precondition_frequency: int = 1,
) -> GradientTransformation:
    """KLSOAPH of modded-nanogpt's track 3: KL-SOAP with steps on the sphere, without decay."""
    statistics = kl_statistics(
        shampoo_beta,
        least_eigenvalue=1 / 4000**2,
        bias_correction=False,
        starts_whole=True,
    )
    turned = _turned(beta1, scale_by_rms(beta2, eps), precondition_frequency)
    return on_matrices(statistics, turned, hyperball(lr))


def _turned(beta1: float, ratio: GradientTransformation, every: int) -> GradientTransformation:
    momentum = ema(beta1, bias_correction=False)
    return in_eigenbasis(chain(momentum, ratio), every, offset=1, basis=orthogonal_iteration())


def _squeezed(shape: tuple[int, ...]) -> Sequence[int]:
    return [d for d in shape if d != 1]
