"""Weight decay: coupled, decoupled, corrected and independent."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from funshampoo.combinators.masks import Mask, masked
from funshampoo.core.checks import check_choice, check_range, check_rate
from funshampoo.core.clock import advanced, count_of, started
from funshampoo.core.context import Context
from funshampoo.core.contract import (
    EmptyState,
    GradientTransformation,
    Hyper,
    Schedule,
    Tree,
    renamed,
)
from funshampoo.core.live import Numbers, value_at
from funshampoo.core.traits import DIRECTED, with_traits
from funshampoo.core.tree import update_columns
from funshampoo.operators.columns import Column, add_scaled, cast_like, in_compute_dtype
from funshampoo.state.stages import ScheduleState

DecayKind: TypeAlias = Literal["coupled", "decoupled", "corrected", "independent"]


def add_decayed_weights(
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
    *,
    kind: DecayKind = "decoupled",
    learning_rate: Hyper | Schedule | None = None,
    peak_learning_rate: Hyper | None = None,
) -> GradientTransformation:
    """Weight decay: U ← U + λ W, into a new tensor.

    With a learning rate α applied later in the chain, the parameter shrinks by

        decoupled     1 - α λ          λ as it is                      (AdamW)
        corrected     1 - α² λ/α_peak  λ · α/α_peak
        independent   1 - α λ/α_peak   λ / α_peak
        coupled       as an L2 penalty: λ as it is, but the stage stands before `blocked`, so that
                      the statistics see it

    α itself comes from the stage that scales by the learning rate, later in the chain. So decoupled
    and coupled are the same sum in different places. Before `trace`, decay passes through the
    momentum (the Distributed Shampoo reference); after it, it does not (AdamW).

    Args:
        weight_decay: λ: a number ≥ 0, a tensor, or a schedule of the old step count.
        mask: which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
        kind: see above.
        learning_rate: α, for "corrected": what `scale_by_learning_rate` gets.
        peak_learning_rate: α_peak > 0, for "corrected" and "independent".

    State: `ScheduleState` if λ or α is a schedule, else empty.

    Raises:
        ValueError: a negative number; α or α_peak missing; from update, params missing.

    Reference: Loshchilov and Hutter, arXiv 1711.05101; Defazio, arXiv 2506.02285 (corrected).

    >>> import torch
    >>> tx = add_decayed_weights(0.1, mask={"w": True, "b": False})
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> zero = {"w": torch.zeros(1), "b": torch.zeros(1)}
    >>> tx.update(zero, tx.init(params), params)[0]
    {'w': tensor([0.1000]), 'b': tensor([0.])}
    """
    check_range("weight_decay", weight_decay, 0.0, schedule=True)
    check_choice("kind", kind, ("coupled", "decoupled", "corrected", "independent"))
    if kind in ("corrected", "independent") and peak_learning_rate is None:
        raise ValueError(f"kind={kind!r} needs peak_learning_rate, the largest learning rate.")
    if peak_learning_rate is not None:
        check_range("peak_learning_rate", peak_learning_rate, 0.0, low_open=True)
    if learning_rate is not None:
        check_rate(learning_rate)
    elif kind == "corrected":
        raise ValueError("kind='corrected' needs learning_rate, as scale_by_learning_rate gets it.")
    scheduled = callable(weight_decay) or (kind == "corrected" and callable(learning_rate))

    def coefficient(count: Any, hyper: Numbers) -> Any:
        def now(value: Any) -> Any:
            return value_at(value, count, hyper)

        if kind == "corrected":
            return now(weight_decay) * now(learning_rate) / now(peak_learning_rate)
        return now(weight_decay) / (now(peak_learning_rate) if kind == "independent" else 1)

    def init(params: Tree, *, clock: bool = False) -> ScheduleState | EmptyState:
        return ScheduleState(started(True, clock)) if scheduled else EmptyState()

    def update(updates: Tree, state: Any, params: Tree, context: Context) -> tuple[Tree, Any]:
        count = count_of(state.steps, context) if scheduled else None
        decay = coefficient(count, context.hyper)

        def decayed_by(u: Column, w: Column) -> tuple[Column]:
            u = in_compute_dtype(u)
            return (add_scaled(u, cast_like(w, u), decay),)

        (decayed,) = update_columns(decayed_by, updates, (), (params,))
        new = ScheduleState(advanced(state.steps, context.donate)) if scheduled else state
        return decayed, new

    numbers = [weight_decay, learning_rate, peak_learning_rate]
    stage = GradientTransformation(
        init, update, counts=scheduled, numbers=numbers, elementwise=True, needs_params=True
    )
    stage = with_traits(stage, DIRECTED)
    if mask is None:
        return stage
    return renamed(masked(stage, mask), stage.name)
