"""Adaptive gradient clipping, by the ratio of update norm to weight norm, unit by unit."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.core.traits import WEIGHS
from funshampoo.operators.leaf_ops import filled, multiply
from funshampoo.operators.leafwise import leafwise
from funshampoo.operators.matrices import norm_over, safe


def adaptive_clip(max_ratio: Hyper = 0.01, epsilon: Hyper = 1e-3) -> GradientTransformation:
    """Adaptive clipping: U_i ← U_i min(1, max_ratio max(‖W_i‖, epsilon) / ‖U_i‖) for each unit i.

    A unit is an index of the first side of a matrix or kernel, with all its incoming weights; a
    vector is one unit. At the start of a chain, on gradients, this is adaptive gradient clipping.

    Args:
        max_ratio: largest ratio of a unit's update norm to its weight norm, > 0.
        epsilon: lower bound on the weight norm, so that units that start at 0 can move.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: Brock et al., arXiv 2102.06171.

    >>> import torch
    >>> w, u = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[6.0, 8.0]])}
    >>> adaptive_clip(0.1).update(u, (), w)[0]
    {'w': tensor([[0.3000, 0.4000]])}
    """
    check_range("max_ratio", max_ratio, 0.0, low_open=True, infinite=True)
    check_range("epsilon", epsilon, 0.0)

    def clipped(u: Tensor, w: Tensor, ratio: Hyper, least: Hyper, block_ndim: int) -> Tensor:
        first = block_ndim + (u.ndim >= block_ndim + 2)
        size, weight = norm_over(u, first), norm_over(w, first)
        floored = torch.maximum(weight, filled(weight, least))
        allowed = multiply(floored, ratio, donate=False)
        return torch.where(size > allowed, u * (allowed / safe(size)), u)

    return leafwise(clipped, [max_ratio, epsilon], needs_params=True, traits=(WEIGHS,))
