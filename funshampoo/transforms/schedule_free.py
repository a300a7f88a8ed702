"""Schedule-Free: training between fast weights and their average, without a schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.checks import check_flag, check_range, check_rate
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import DIRECTED, FLIPS, TRACKS
from funshampoo.core.tree import update_leaves
from funshampoo.linalg.products import power
from funshampoo.operators.averaged import copies, interpolated_step
from funshampoo.operators.last_stage import last_stage
from funshampoo.operators.leaf_ops import add, filled, sent_once
from funshampoo.operators.weights import first_weights
from funshampoo.state.averages import ScheduleFreeState
from funshampoo.state.stages import LearningRateState


def schedule_free(
    learning_rate: Hyper | Schedule,
    beta: Hyper = 0.9,
    *,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    own_steps: bool = True,
) -> GradientTransformation:
    """Schedule-Free: the parameters are y, where gradients are taken; evaluate the model with x.

        z ← z - α U,   x ← (1 - c) x + c z,   y ← beta x + (1 - beta) z
        c = w / Σ w,   w = t^r (largest α so far)^weight_lr_power

    Put it at the end of a chain instead of `scale_by_learning_rate`, after a direction without
    momentum, since `beta` acts as one: chain(scale_by_adam(0.0), schedule_free(α)). x is
    `funshampoo.evaluation_parameters(state, params)`. While α is 0, as at the first step of a
    warm-up, c is 0 and nothing moves.

    Args:
        learning_rate: α: number, tensor, or schedule of the old step count, such as a warm-up.
        beta: in [0, 1].
        r, weight_lr_power: exponents of the weights w, ≥ 0.
        own_steps: t and Σ w count each leaf's own gradients; False: all steps.

    State: `ScheduleFreeState`: x and z, where AdamW has its first moment. The published code stores
    only z and recovers x from z and y; here x stays exact with half-precision parameters.

    Raises:
        ValueError: an argument out of range; from update, params missing.
        TypeError: own_steps is not a bool.

    Reference: Defazio et al., arXiv 2405.15682.

    >>> import torch
    >>> tx = schedule_free(0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
    {'w': tensor([-0.5000])}
    """
    check_rate(learning_rate)
    check_range("beta", beta, 0.0, 1.0)
    check_range("r", r, 0.0)
    check_range("weight_lr_power", weight_lr_power, 0.0)
    check_flag("own_steps", own_steps)
    scheduled = callable(learning_rate)

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> ScheduleFreeState:
        total, largest, seen = (
            first_weights(params, block_ndim, corrects=True, own_steps=own_steps) for _ in range(3)
        )
        rate = LearningRateState(started(scheduled, clock))
        return ScheduleFreeState(copies(params), copies(params), total, largest, seen, rate)

    def update(
        updates: Tree, state: ScheduleFreeState, params: Tree, context: Context
    ) -> tuple[Tree, ScheduleFreeState]:
        rate = rate_of(learning_rate, state.rate.steps, context)
        between = number(beta, context.hyper)

        def weighed(total: Tensor, largest: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
            seen = add(seen, torch.ones_like(seen), context.donate)
            largest = torch.maximum(largest, filled(largest, rate))
            weight = power(seen, r) * power(largest, weight_lr_power)
            total = add(total, weight, context.donate)
            share = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
            return share, total, largest, seen

        x, z, *numbers, _ = state
        everyone = () if own_steps else weighed(*numbers)
        shared = sent_once(everyone[0]) if everyone else None

        def leaf(u: Tensor, y: Tensor, x: Tensor, z: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            share, *sums = (shared(x),) if shared else weighed(*own)
            step, x, z = interpolated_step(u, y, x, z, rate, share, between, context.donate)
            return step, x, z, *sums

        kept = (x, z, *numbers) if own_steps else (x, z)
        step, x, z, *found = update_leaves(leaf, updates, kept, (params,))
        total, largest, seen = found or everyone[1:]
        now = LearningRateState(advanced(state.rate.steps, context.donate))
        return step, ScheduleFreeState(x, z, total, largest, seen, now)

    return last_stage(init, update, learning_rate, beta, traits=(DIRECTED, FLIPS, TRACKS))
