"""Leaves or blocks viewed as matrices, and norms over parts of them."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.contract import Tree
from funshampoo.core.parameters import UnfitLeafError
from funshampoo.core.placed import is_in_parts
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.linalg.norms import norm_over_axes, range_scale, stand
from funshampoo.operators.leaf_ops import per_block


def check_matrices(params: Tree, block_ndim: int) -> None:
    """Raises UnfitLeafError for a parameter with fewer than two sides; names it."""
    for name, p in zip(leaf_names(params), flatten(params)[0]):
        if p.ndim < block_ndim + 2:
            raise UnfitLeafError(
                f"orthogonalize: '{{}}' has the shape {tuple(p.shape[block_ndim:])} and is no "
                "matrix. Give it to another method, by partition(...), or pass vectors='pass' to "
                "leave such updates as they are.",
                name,
            )


def as_rows(u: Tensor, block_ndim: int, flat: bool = True) -> Tensor:
    """(..., r, c): one side makes a column, a scalar is 1×1.

    Args:
        flat: more than two sides become (the first, the rest); False keeps them, and the last two
            are the matrix.

    >>> as_rows(torch.zeros(4, 2, 3), 0).shape, as_rows(torch.zeros(4), 0).shape
    (torch.Size([4, 6]), torch.Size([4, 1]))
    """
    order = u.ndim - block_ndim
    if order < 2:
        return u.reshape(*u.shape, *[1] * (2 - order))
    return u.flatten(block_ndim + 1) if flat else u


def norm_over(x: Tensor, first: int) -> Tensor:
    """The Frobenius norm over all axes from `first` on, which are kept with length 1.

    Correct even if squares leave the dtype's range, within the limits of `linalg.norms`.
    """
    axes = tuple(range(first, x.ndim))
    if not axes:
        return x.abs()
    norm = norm_over_axes(x, axes, keepdim=True)
    if is_in_parts(x):
        return norm
    counted, rows = norm.reshape(x.shape[:first]), x
    if first > 1:
        counted, rows = counted.flatten(), x.flatten(0, first - 1)
    if stand([counted], [rows]):
        return norm
    scale = range_scale(norm)
    return norm_over_axes(x * scale, axes, keepdim=True) / scale


def inner_product(x: Tensor, y: Tensor, block_ndim: int) -> Tensor:
    """⟨x, y⟩ of every block, viewed so that it broadcasts over the blocks."""
    products = x * y
    return per_block(products.reshape(*x.shape[:block_ndim], -1).sum(-1), x)


def safe(x: Tensor) -> Tensor:
    """x as a divisor: 1 where it is 0."""
    return torch.where(x == 0, 1.0, x)
