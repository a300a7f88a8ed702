"""Weight decay applied after the step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.core.checks import check_range, check_rate
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.traits import LATE
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.leafwise import leafwise_at_rate
from funshampoo.operators.shape_scale import Scale, check_scale, is_of_no_shape
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

    def decayed(u: Tensor, w: Tensor, rate: Hyper, decay: Hyper, block_ndim: int) -> Tensor:
        shrunk = (w + u) * factor_of(scale, tuple(u.shape[block_ndim:]))
        return u - multiply(shrunk, decay * rate, donate=False)

    options: Any = {"elementwise": is_of_no_shape(scale), "traits": (LATE,)}
    return leafwise_at_rate(decayed, learning_rate, [weight_decay], **options)
