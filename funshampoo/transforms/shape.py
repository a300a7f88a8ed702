"""Scaling by a factor of a parameter's shape."""

from __future__ import annotations

import math

from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.operators.leafwise import leafwise
from funshampoo.operators.shape_scale import Scale, check_scale, is_of_no_shape, shape_factor


def scale_by_shape(scale: Scale) -> GradientTransformation:
    """Scale the updates by a factor of their shape: U ← s(shape) U.

    Args:
        scale: s: by rows r and columns c, "muon" √max(1, r/c), "adam" 0.2 √max(r, c), "spectral"
            √max(r, c), "unit_rms" √(r/c); more sides count as the matrix (the first, the rest),
            fewer as a column. Or a number, or a function of the shape of a leaf, in `blocked` of a
            block. None: 1.

    Raises:
        ValueError: an unknown scale.

    >>> import torch
    >>> scale_by_shape(lambda shape: 2 / sum(shape)).update({"w": torch.ones(1, 3)}, ())[0]
    {'w': tensor([[0.5000, 0.5000, 0.5000]])}
    """
    check_scale(scale)

    def scaled(u: Tensor, block_ndim: int) -> Tensor:
        return u * factor_of(scale, tuple(u.shape[block_ndim:]))

    return leafwise(scaled, elementwise=is_of_no_shape(scale))


def factor_of(scale: Scale, shape: tuple[int, ...]) -> float:
    """s for a leaf of this shape."""
    rows, *rest = shape or (1,)
    return shape_factor(scale, (rows, math.prod(rest)), shape)
