"""The sign of the updates: steepest descent in the max norm."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from funshampoo.core.checks import check_choice, check_range
from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.operators.leaf_ops import multiply, per_block
from funshampoo.operators.leafwise import leafwise


def sign(scale: Hyper | Literal["mean", "sum"] | None = None) -> GradientTransformation:
    """Sign descent: U ← s sign(U), entry by entry; 0 stays 0. Derivatives ignore the jump at 0.

    Args:
        scale: s: None for 1, a number, or taken from the leaf (in `blocked`, the block): "mean",
            the mean of |U_ij|, so that a small gradient makes a small step, or "sum", ‖U‖₁, the
            steepest descent under the norm max |W_ij|.

    Raises:
        ValueError: an unknown scale.

    Reference: Bernstein et al., arXiv 1802.04434.

    >>> import torch
    >>> sign().update({"w": torch.tensor([3.0, 0.0, -1.0])}, ())[0]
    {'w': tensor([ 1.,  0., -1.])}
    >>> sign("sum").update({"w": torch.tensor([3.0, 0.0, -1.0])}, ())[0]
    {'w': tensor([ 4.,  0., -4.])}
    """
    if isinstance(scale, str):
        check_choice("scale", scale, ("mean", "sum", None))
    elif scale is not None:
        check_range("scale", scale, 0.0)

    def signs(u: Tensor, s: Any, block_ndim: int) -> Tensor:
        if s is None:
            return u.sign()
        if not isinstance(s, str):
            return multiply(u.sign(), s, donate=False)
        sizes = u.abs().reshape(*u.shape[:block_ndim], -1)
        return u.sign() * per_block(sizes.mean(-1) if s == "mean" else sizes.sum(-1), u)

    return leafwise(signs, [scale], elementwise=not isinstance(scale, str))
