"""Cautious weight decay: only where the update shrinks the weight anyway."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.traits import DIRECTED, with_traits
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.operators.leaf_ops import multiply


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

    def decayed(updates: Tree, params: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        decay = number(weight_decay, hyper)

        def leaf(u: Tensor, w: Tensor) -> tuple[Tensor]:
            u = wide(u)
            w = cast(w, u.dtype)
            return (u + multiply(w * cast(w.sign() * u >= 0, u.dtype), decay, donate=False),)

        return update_leaves(leaf, updates, (), (params,))[0]

    stage = stateless(
        decayed, "add_cautious_decay", numbers=[weight_decay], elementwise=True, needs_params=True
    )
    return with_traits(stage, DIRECTED)
