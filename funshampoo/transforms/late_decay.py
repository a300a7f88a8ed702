"""Weight decay applied after the step."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range, check_rate
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import LATE
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.operators.last_stage import last_stage
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.shape_scale import Scale, check_scale, is_of_no_shape
from funshampoo.state.stages import LearningRateState
from funshampoo.transforms.shape import factor_of


def decay_after_step(
    weight_decay: Hyper, learning_rate: Hyper | Schedule, *, scale: Scale = None
) -> GradientTransformation:
    """Weight decay after the step: U ← U - λ α s (W + U), which shrinks the step as well.

    Put it at the end of a chain, after the learning rate. An average between the two, such as
    `tail_average`, averages weights that have not been decayed yet.

    Args:
        weight_decay: λ ≥ 0.
        learning_rate: α: number, tensor, or schedule of the old step count.
        scale: s from the leaf's shape, as in `scale_by_shape`; None: 1.

    State: `LearningRateState`.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: Frans et al., arXiv 2506.07254, where `add_decayed_weights` would be usual.

    >>> import torch
    >>> w = {"w": torch.ones(1)}
    >>> tx = decay_after_step(0.5, 0.5)
    >>> tx.update({"w": -torch.full((1,), 0.2)}, tx.init(w), w)[0]
    {'w': tensor([-0.4000])}
    """
    check_range("weight_decay", weight_decay, 0.0)
    check_rate(learning_rate)
    check_scale(scale)

    def init(params: Tree, *, clock: bool = False) -> LearningRateState:
        return LearningRateState(started(callable(learning_rate), clock))

    def update(
        updates: Tree, state: LearningRateState, params: Tree, context: Context
    ) -> tuple[Tree, LearningRateState]:
        rate = rate_of(learning_rate, state.steps, context)
        share = number(weight_decay, context.hyper) * rate

        def leaf(u: Tensor, w: Tensor) -> tuple[Tensor]:
            u = wide(u)
            shrunk = (cast(w, u.dtype) + u) * factor_of(scale, tuple(u.shape[context.block_ndim :]))
            return (u - multiply(shrunk, share, donate=False),)

        out = update_leaves(leaf, updates, (), (params,))[0]
        return out, LearningRateState(advanced(state.steps, context.donate))

    alike = is_of_no_shape(scale)
    return last_stage(init, update, weight_decay, learning_rate, elementwise=alike, traits=(LATE,))
