"""The weight averages of the Distributed Shampoo reference, as it computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import number
from funshampoo.core.needs import rate_of
from funshampoo.core.tree import cast, map_leaves, update_leaves
from funshampoo.operators.averaged import copies
from funshampoo.operators.leaf_ops import filled, on_device, per_block, sent
from funshampoo.state.averages import PrimalAverageState, ScheduleFreeState
from funshampoo.state.stages import LearningRateState
from funshampoo.transforms.weight_decay import DecayKind


def averaged_as_published(
    learning_rate: Hyper | Schedule,
    *,
    average: float | None,
    interpolation: float,
    lr_power: float = 2.0,
    own_steps: bool = True,
    weight_decay: Hyper = 0.0,
    kind: DecayKind = "decoupled",
    peak: Hyper | None = None,
) -> GradientTransformation:
    """`primal_average`, or `schedule_free` if average is None, as in the reference.

        z_d = (1 - α λ) z,   z ← z_d - α U,   μ_y = interpolation
        y ← μ_x y + (1 - μ_x) z_d - α (1 - μ_x μ_y) U
        μ_x = average, or 1 - w / Σ w,   w = (largest α so far)^lr_power

    In exact arithmetic and without decay these are the papers' updates. With decay, z shrinks
    before it meets y, as if x = (y - (1 - μ_y) z) / μ_y had first moved outwards by (1 - μ_y)/μ_y α
    λ z. Schedule-Free's μ_x and 1 - μ_x μ_y are rounded to float32 there, and so they are here.

    Args:
        learning_rate: α.
        own_steps: as in `schedule_free`.
        weight_decay, kind, peak: λ and its kind, as in `add_decayed_weights`; not "coupled".

    State: that of the stage that it replaces; `evaluation_parameters` reads x.
    """
    check_range("train_interp_coeff", interpolation, 0.0, 1.0, low_open=True)
    if average is not None:
        check_range("eval_interp_coeff", average, 0.0, 1.0, high_open=True)
    scheduled = callable(learning_rate)

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> Any:
        rate = LearningRateState(started(scheduled, clock))
        if average is not None:
            return PrimalAverageState(copies(params), copies(params), rate)
        total, largest, seen = (_zeros(params, block_ndim, own_steps) for _ in range(3))
        return ScheduleFreeState(copies(params), copies(params), total, largest, seen, rate)

    def update(updates: Tree, state: Any, params: Tree, context: Context) -> tuple[Tree, Any]:
        rate = rate_of(learning_rate, state.rate.steps, context)
        decay, largest = number(weight_decay, context.hyper), number(peak, context.hyper)
        shrink = _shrink(rate, decay, kind, largest)

        shared = average is not None or not own_steps
        x, z, *sums, _ = state
        everyone = _shares(average, interpolation, rate, lr_power, sums) if shared else None

        def leaf(u: Tensor, y: Tensor, x: Tensor, z: Tensor, *own: Tensor) -> tuple[Any, ...]:
            found = everyone or _shares(average, interpolation, rate, lr_power, own)
            mu, share = (
                per_block(sent(s, x), x) if isinstance(s, Tensor) else s for s in found[:2]
            )
            before = interpolation * x + (1 - interpolation) * z
            z = z - cast(z * on_device(shrink, z), z.dtype)
            step = cast(cast(u, z.dtype) * on_device(rate, z), z.dtype)
            new = mu * before + (1 - mu) * z - share * step
            z = z - step
            x = (new - (1 - interpolation) * z) / interpolation
            return new - cast(y, z.dtype), x, z, *(() if shared else found[2])

        kept = (x, z) if shared else (x, z, *sums)
        step, x, z, *rest = update_leaves(leaf, updates, kept, (params,))
        found = everyone[2] if everyone else rest
        now = LearningRateState(advanced(state.rate.steps, context.donate))
        return step, type(state)(x, z, *found, now)

    return GradientTransformation(
        init,
        update,
        "schedule_free" if average is None else "primal_average",
        counts=scheduled,
        numbers=[learning_rate, weight_decay, peak],
        elementwise=True,
        minds_alive=False,
        needs_params=True,
    )


def _zeros(params: Tree, block_ndim: int, own_steps: bool) -> Tree:
    if not own_steps:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    return map_leaves(lambda p: p.new_zeros(p.shape[:block_ndim], dtype=torch.float32), params)


def _shrink(rate: Any, weight_decay: Any, kind: DecayKind, peak: Any) -> Any:
    if kind == "corrected":
        return rate * weight_decay * rate / peak
    return rate * weight_decay / (peak if kind == "independent" else 1.0)


def _shares(
    average: float | None, interpolation: float, rate: Any, power: float, sums: Any
) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """(μ_x, 1 - μ_x μ_y, the sums after this step)."""
    if average is not None:
        return average, 1 - average * interpolation, ()
    total, largest, seen = sums
    largest = torch.maximum(largest, filled(largest, rate))
    weight = largest.square() if power == 2 else largest**power
    total = total + weight
    mu = 1 - torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
    return mu, 1 - mu * interpolation, (total, largest, seen + 1)
