"""A lower bound on the size of updates relative to the weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from funshampoo.core.checks import check_choice, check_range
from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.leafwise import leafwise
from funshampoo.operators.matrices import norm_over, safe


def update_floor(
    min_ratio: Hyper, *, per: Literal["tensor", "row"] = "tensor"
) -> GradientTransformation:
    """Minimum update size relative to the weights: U ← U max(1, min_ratio ‖W‖ / ‖U‖).

    Put the learning rate after it. An update of zero stays zero.

    Args:
        min_ratio: ≥ 0.
        per: norms over the whole leaf (in `blocked`, the block), or over each index of its first
            side. A vector is one row.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: target_uw of the SOAP-Muon record, KellerJordan/modded-nanogpt, track 3 (2026).

    >>> import torch
    >>> w, u = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.1])}
    >>> update_floor(0.5).update(u, (), w)[0]
    {'w': tensor([0.0000, 2.5000])}
    """
    check_range("min_ratio", min_ratio, 0.0)
    check_choice("per", per, ("tensor", "row"))

    def raised(u: Tensor, w: Tensor, ratio: Hyper, block_ndim: int) -> Tensor:
        first = block_ndim + (per == "row" and u.ndim >= block_ndim + 2)
        size = norm_over(u, first)
        wanted = multiply(norm_over(w, first), ratio, donate=False)
        return torch.where(size < wanted, u / safe(size) * wanted, u)

    return leafwise(raised, [min_ratio], needs_params=True)
