"""The Schedule-Free methods, from their constructors' arguments.

All their counts and sums are over a group's steps, even for a parameter without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.checks import check_count
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import Derived
from funshampoo.core.tree import update_leaves
from funshampoo.operators.leaf_ops import sent
from funshampoo.recipes.routing import decay
from funshampoo.transforms import scale_by_adam, schedule_free


def adamw(
    *,
    lr: Hyper | Schedule = 0.0025,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: Any = None,
    inner_momentum: Hyper = 0.0,
) -> GradientTransformation:
    """AdamWScheduleFree. foreach has no effect here."""
    beta, beta2 = betas
    return chain(
        scale_by_adam(inner_momentum, beta2, eps, own_steps=False),
        *decay(weight_decay),
        _free(warmed(lr, warmup_steps), beta, r, weight_lr_power),
    )


def sgd(
    *,
    lr: Hyper | Schedule = 1.0,
    momentum: Hyper = 0.9,
    weight_decay: Hyper = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: Any = None,
) -> GradientTransformation:
    """SGDScheduleFree. foreach has no effect here."""
    return chain(
        *decay(weight_decay),
        _free(warmed(lr, warmup_steps), momentum, r, weight_lr_power),
    )


def radam(
    *,
    lr: Hyper | Schedule = 0.0025,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: Any = None,
    silent_sgd_phase: bool = True,
) -> GradientTransformation:
    """RAdamScheduleFree: warm-up by how well the second moment is known. foreach has no effect."""
    beta, beta2 = betas
    rate = rectified(lr, beta2, 0.0 if silent_sgd_phase else 1.0)
    return chain(
        once_known(scale_by_adam(0.0, beta2, eps, own_steps=False), beta2),
        *decay(weight_decay),
        _free(rate, beta, r, weight_lr_power),
    )


def _free(
    rate: Hyper | Schedule, beta: Hyper, r: float, weight_lr_power: float
) -> GradientTransformation:
    return schedule_free(rate, beta, r=r, weight_lr_power=weight_lr_power, own_steps=False)


def warmed(lr: Hyper | Schedule, warmup_steps: int) -> Hyper | Schedule:
    """lr min(1, k / warmup_steps) at step k."""
    check_count("warmup_steps", warmup_steps, 0)
    if not warmup_steps:
        return lr

    def warm(count: Tensor, lr: Any) -> Any:
        return lr * torch.clamp((count + 1).double() / warmup_steps, max=1.0)

    return Derived(warm, (lr,))


def rectified(lr: Hyper | Schedule, beta2: float, before: float) -> Schedule:
    """lr times RAdam's rectification or, before that exists, times `before`."""

    def rate(count: Tensor, lr: Any) -> Any:
        rho, most = _degrees(count, beta2)
        grown = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
        return lr * torch.where(rho > 4, torch.sqrt(torch.clamp(grown, min=0.0)), before)

    return Derived(rate, (lr,))


def once_known(inner: GradientTransformation, beta2: float) -> GradientTransformation:
    """inner(G) from the first step that RAdam rectifies; before it, G."""

    def update(run: Callable[..., Tree], updates: Tree, own: Any, *, clock: Tensor) -> Any:
        known = _degrees(clock, beta2)[0] > 4

        def leaf(u: Tensor, g: Tensor) -> tuple[Tensor]:
            return (torch.where(sent(known, u, torch.bool), u, g.to(u.dtype)),)

        return update_leaves(leaf, run(updates), (), (updates,))[0], own

    return wrapping(inner, update, name="once_known", elementwise=True)


def _degrees(count: Tensor, beta2: float) -> tuple[Tensor, float]:
    """ρ of this step and ρ∞ (Liu et al., arXiv 1908.03265)."""
    k = (count + 1).double()
    most = 2 / (1 - beta2) - 1
    power = beta2**k
    return most - 2 * k * power / (1 - power), most
