"""Nesterov look-ahead of any method, along the average of its steps."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.clock import advanced, count_of, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import number, value_at
from funshampoo.core.traits import LATE, TRACKS
from funshampoo.core.tree import cast, update_leaves
from funshampoo.operators.averaged import copies
from funshampoo.operators.last_stage import last_stage
from funshampoo.operators.leaf_ops import lerp, multiply
from funshampoo.operators.weights import full_like
from funshampoo.state.averages import EmaNesterovState


def ema_nesterov(look_ahead: Hyper | Schedule, beta: Hyper = 0.9) -> GradientTransformation:
    """EMA-Nesterov around any method: step from weights w, take gradients at y = w + s B.

        w ← y + U,   B ← beta B + (1 - beta) (w - w_old),   U ← w + s B - y

    Put it at the end of a chain, after the learning rate. The parameters are y. w - w_old is a
    whole step, including the look-ahead before it. Evaluate the model with w, which is
    `funshampoo.evaluation_parameters(state, params)`.

    Args:
        look_ahead: s ≥ 0, or a schedule: a function of the number of steps done when the next
            gradient is taken, 1 after the first step. A schedule can start late (B fills
            meanwhile), end before the last steps, and follow the learning rate.
        beta: decay of B, in [0, 1).

    State: `EmaNesterovState`: w and B, two numbers per parameter.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: EMA-Nesterov of KellerJordan/modded-nanogpt, track 3 (2026).

    >>> import torch
    >>> tx = ema_nesterov(0.5, beta=0.75)
    >>> params = {"w": torch.zeros(1)}
    >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
    {'w': tensor([1.1250])}
    """
    check_range("look_ahead", look_ahead, 0.0, schedule=True)
    check_range("beta", beta, 0.0, 1.0, high_open=True)
    scheduled = callable(look_ahead)

    def init(params: Tree, *, clock: bool = False) -> EmaNesterovState:
        steps = started(scheduled, clock)
        return EmaNesterovState(copies(params), full_like(params, 0.0), steps)

    def update(
        updates: Tree, state: EmaNesterovState, params: Tree, context: Context
    ) -> tuple[Tree, EmaNesterovState]:
        done = count_of(state.steps, context) + 1 if scheduled else None
        s = value_at(look_ahead, done, context.hyper)
        decay = number(beta, context.hyper)

        def leaf(u: Tensor, y: Tensor, w: Tensor, B: Tensor) -> tuple[Tensor, ...]:
            new = cast(y, w.dtype) + cast(u, w.dtype)
            B = lerp(B, new - w, 1 - decay, context.donate)
            return cast(u, w.dtype) + multiply(B, s, donate=False), new, B

        out, w, B = update_leaves(leaf, updates, (state.evaluated, state.buffer), (params,))
        return out, EmaNesterovState(w, B, advanced(state.steps, context.donate))

    return last_stage(init, update, look_ahead, beta, traits=(TRACKS, LATE))
