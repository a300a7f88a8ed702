"""Factor matrices: their initial value, and their update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Block, Hyper, Tree
from funshampoo.core.tree import compute_dtype, map_leaves
from funshampoo.linalg.low_precision import rounded_gram
from funshampoo.operators.leaf_ops import add, add_gram, multiply, per_block
from funshampoo.operators.packed import like, packed_shape, packs
from funshampoo.operators.packed_statistics import add_packed_gram


def zero_factors(
    params: Tree,
    block_ndim: int,
    powers: Callable[[Block], Sequence[float]],
    packed: bool = False,
) -> Tree:
    """Factors before the first gradient: per leaf, zeros for every side with a power, or ()."""

    def leaf(x: Tensor) -> tuple[Any, ...]:
        def zeros(d: int) -> Tensor:
            shape = packed_shape(d) if packs(d, packed) else (d, d)
            return x.new_zeros(*x.shape[:block_ndim], *shape, dtype=compute_dtype(x))

        block = tuple(x.shape[block_ndim:])
        sides = zip(block, powers(block))
        return tuple([zeros(d) if e > 0 and x.numel() else () for d, e in sides])

    return map_leaves(leaf, params)


def accumulated_factor(
    factor: Any,
    x: Any,
    beta: Hyper,
    weight: Hyper,
    donate: bool,
    product_dtype: torch.dtype | None = None,
    *,
    by_row: bool = False,
) -> Any:
    """beta L_i + weight x xᵀ, with x = mat_i(G). () stays.

    Args:
        by_row: beta is one number per row, (N,), on some steps. On a CPU the others then apply it
            in the same way, before the product, in which some kernels round it otherwise; that is
            a pass of its own.
    """
    if not isinstance(factor, Tensor):
        return factor
    if by_row and (factor.is_cpu or isinstance(beta, Tensor)):
        decay = per_block(beta, factor) if isinstance(beta, Tensor) else beta
        factor, beta = multiply(factor, decay, donate), 1.0
    product = None if product_dtype is None else rounded_gram(x, product_dtype)
    if product is None:
        is_packed = factor.shape[-2] != factor.shape[-1]
        add_product = add_packed_gram if is_packed else add_gram
        return add_product(factor, x, beta, weight, donate)
    new = multiply(like(product, factor), weight, donate=True)
    return add(multiply(factor, beta, donate), new, donate)
