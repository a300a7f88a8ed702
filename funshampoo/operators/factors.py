"""The factor matrices of one leaf: before its first gradient, and after another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.tree import compute_dtype
from funshampoo.linalg.low_precision import rounded_gram
from funshampoo.operators.leaf_ops import add, add_gram, multiply, per_block
from funshampoo.operators.packed import like, packed_shape, packs
from funshampoo.operators.packed_statistics import add_packed_gram


def zero_factors_of(
    x: Tensor, block_ndim: int, powers: Sequence[float], packed: bool = False
) -> tuple[Any, ...]:
    """Factors of a leaf before its first gradient: zeros for every side with an exponent, or ()."""

    def zeros(d: int) -> Tensor:
        shape = packed_shape(d) if packs(d, packed) else (d, d)
        return x.new_zeros(*x.shape[:block_ndim], *shape, dtype=compute_dtype(x))

    sides = zip(x.shape[block_ndim:], powers)
    return tuple([zeros(d) if e > 0 and x.numel() else () for d, e in sides])


def accumulated_factor(
    factor: Any,
    x: Any,
    beta: Hyper,
    weight: Hyper,
    donate: bool,
    product_dtype: torch.dtype | None = None,
) -> Any:
    """beta L_i + weight x xᵀ, of x = mat_i(G); beta may be one a row, (N,). () stays."""
    if not isinstance(factor, Tensor):
        return factor
    if isinstance(beta, Tensor) and beta.ndim:
        factor, beta = multiply(factor, per_block(beta, factor), donate), 1.0
    product = None if product_dtype is None else rounded_gram(x, product_dtype)
    if product is None:
        is_packed = factor.shape[-2] != factor.shape[-1]
        add_product = add_packed_gram if is_packed else add_gram
        return add_product(factor, x, beta, weight, donate)
    new = multiply(like(product, factor), weight, donate=True)
    return add(multiply(factor, beta, donate), new, donate)
