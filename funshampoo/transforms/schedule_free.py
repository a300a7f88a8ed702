"""Training at a point between fast weights and their average, without a schedule."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from funshampoo.core.checks import check_range, check_rate
from funshampoo.core.clock import advanced, started
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.needs import rate_of, required
from funshampoo.core.parameters import check_parameters
from funshampoo.core.tree import update_leaves
from funshampoo.linalg.products import power
from funshampoo.operators.averaged import copies, interpolated_step
from funshampoo.operators.columns import zeros_a_block
from funshampoo.operators.leaf_ops import add, filled
from funshampoo.state.averages import ScheduleFreeState
from funshampoo.state.stages import LearningRateState


def schedule_free(
    learning_rate: Hyper | Schedule,
    beta: Hyper = 0.9,
    *,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> GradientTransformation:
    """Schedule-Free: the parameters are y, where gradients are taken; evaluate the model with x.

        z ← z - α U,   x ← (1 - c) x + c z,   y ← beta x + (1 - beta) z
        c = w / Σ w,   w = t^r (largest α so far)^weight_lr_power

    It stands at the end of a chain in the place of `scale_by_learning_rate`, behind a direction
    without momentum, `beta` being one: chain(scale_by_adam(0.0), schedule_free(α)). x is
    `funshampoo.evaluation_parameters(state, params)`. While α is 0, as at the first step of a
    warm-up, c is 0 and nothing moves.

    Args:
        learning_rate: α: number, tensor, or schedule of the old step count, such as a warm-up.
        beta: in [0, 1].
        r, weight_lr_power: of the weights w, ≥ 0. t counts the leaf's own gradients.

    State: `ScheduleFreeState`: x and z, where AdamW has its first moment. The published code keeps
    z alone and finds x from z and y; here parameters in half precision do not lose it.

    Raises:
        ValueError: an argument out of range; from update, params missing.

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

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> ScheduleFreeState:
        check_parameters(params, "schedule_free")
        rate = LearningRateState(started(callable(learning_rate), clock))
        zeros = functools.partial(zeros_a_block, params, block_ndim)
        return ScheduleFreeState(copies(params), copies(params), zeros(), zeros(), zeros(), rate)

    def update(
        updates: Tree,
        state: ScheduleFreeState,
        params: Tree = None,
        *,
        block_ndim: int = 0,
        donate: bool = False,
        clock: Tensor | None = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, ScheduleFreeState]:
        rate = rate_of(learning_rate, state.rate.steps, clock, hyper)
        between = number(beta, hyper)

        def leaf(u: Tensor, y: Tensor, x: Tensor, z: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
            total, largest, seen = sums
            seen = add(seen, torch.ones_like(seen), donate)
            largest = torch.maximum(largest, filled(largest, rate))
            weight = power(seen, r) * power(largest, weight_lr_power)
            total = add(total, weight, donate)
            share = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
            step, x, z = interpolated_step(u, y, x, z, rate, share, between, donate)
            return step, x, z, total, largest, seen

        params = required(params, "schedule_free", block_ndim)
        step, x, z, *sums = update_leaves(leaf, updates, state[:5], (params,))
        now = LearningRateState(advanced(state.rate.steps, donate))
        return step, ScheduleFreeState(x, z, sums[0], sums[1], sums[2], now)

    return GradientTransformation(
        init,
        update,
        counts=callable(learning_rate),
        numbers=[learning_rate, beta],
        needs_params=True,
    )
