"""Cautious weight decay: only where the update shrinks the weight anyway."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.core.traits import DIRECTED
from funshampoo.core.tree import cast
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.leafwise import leafwise


def add_cautious_decay(weight_decay: Hyper = 0.0) -> GradientTransformation:
    """Cautious weight decay: U ← U + λ W where W U ≥ 0, entry by entry, else U.

    Put it where `add_decayed_weights` would go, before the learning rate: a step goes along -U.

    Args:
        weight_decay: λ ≥ 0.

    Raises:
        ValueError: a negative number; from update, params missing.

    Reference: Chen et al., arXiv 2510.12402; the option cautious_wd of microsoft/dion.

    >>> import torch
    >>> w, u = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.5, -0.5])}
    >>> add_cautious_decay(0.1).update(u, (), w)[0]
    {'w': tensor([ 0.6000, -0.5000])}
    """
    check_range("weight_decay", weight_decay, 0.0)

    def decayed(u: Tensor, w: Tensor, decay: Hyper, block_ndim: int) -> Tensor:
        return u + multiply(w * cast(w.sign() * u >= 0, u.dtype), decay, donate=False)

    return leafwise(
        decayed, [weight_decay], needs_params=True, elementwise=True, traits=(DIRECTED,)
    )
