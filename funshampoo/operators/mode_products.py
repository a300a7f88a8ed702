"""Unfoldings of blocks, mode products with one matrix per side, corrected factor matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from funshampoo.core.tree import cast
from funshampoo.linalg.low_precision import rounded_matmul
from funshampoo.linalg.products import matmul
from funshampoo.operators.packed import unpack


def unfoldings(x: Tensor, block_ndim: int, wanted: Sequence[bool]) -> Iterator[Tensor | None]:
    """mat_i of each wanted side, else None; lazily, so that no two copies of x are held at once.

    The order of their columns may vary: x xᵀ does not depend on it. One copy with the last side
    in front serves the last two sides of a tensor: the last one as rows, which a product reads in
    half the time of columns, the one before as transposed columns.
    """
    order, lead = x.ndim - block_ndim, x.shape[:block_ndim]
    apart = order if order < 3 else order - 2
    for side in range(apart):
        yield unfold(x, side, block_ndim) if wanted[side] else None
    if apart == order:
        return
    last_first = x.movedim(-1, block_ndim).contiguous() if any(wanted[apart:]) else x
    yield last_first.reshape(*lead, -1, x.shape[-2]).mT if wanted[-2] else None
    yield last_first.reshape(*lead, x.shape[-1], -1) if wanted[-1] else None


def unfold(x: Tensor, side: int, block_ndim: int = 0) -> Tensor:
    """Mode-i unfolding mat_i of every block, (N, d_i, the rest). A view if possible.

    >>> unfold(torch.arange(6).reshape(2, 3), side=1)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    if x.ndim == block_ndim + 2:  # a matrix
        return x.mT if side else x
    moved = x.movedim(block_ndim + side, block_ndim) if side else x
    kept = moved.shape[: block_ndim + 1]  # -1 would be ambiguous if there are no entries
    return moved.reshape(*kept, math.prod(moved.shape[block_ndim + 1 :]))


def bias_corrected(factor: Tensor, weight: Tensor) -> Tensor:
    """L_i / weight, a new tensor, never packed; zeros for a weight of 0 (no gradient yet)."""
    safe = torch.where(weight > 0, weight, torch.ones_like(weight))
    return unpack(factor) / (safe[..., None, None] if safe.ndim else safe)


def mode_flops(block: Sequence[int], sides: Sequence[int]) -> float:
    """FLOPs of a product with a d×d matrix, or of mat_i with its transpose, summed over sides d.

    Args:
        block: its shape.
        sides: lengths d of the sides that have a product.

    >>> mode_flops((2, 3), (2,))
    24.0
    """
    return 2.0 * math.prod(block) * sum(sides)


_FEW_COLUMNS = 16


def precondition(
    x: Tensor,
    roots: Sequence[Tensor | None],
    block_ndim: int = 0,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply every block by its roots, x ×_1 X_1 … ×_k X_k: one mode product per given root.

    Args:
        x: (N, d_1, ..., d_k), or without N if block_ndim is 0.
        roots: one entry per side, (N, d_i, d_i), symmetric, possibly packed, or None.
        product_dtype: torch.bfloat16 rounds the operands of every product, so intermediate results
            too; the final result is in x's dtype. Vectors and products of at most 16³
            multiplications per block stay in full precision: see `linalg.low_precision`.

    >>> precondition(torch.ones(2), [torch.tensor([[2.0, 0.0], [0.0, 3.0]])])
    tensor([2., 3.])
    """
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for X in roots:
        pairs.append(None if X is None else (unpack(X),) * 2)
    return _mode_products(x, pairs, block_ndim, product_dtype)


def rotate(
    x: Tensor, matrices: Sequence[Tensor | None], block_ndim: int = 0, back: bool = False
) -> Tensor:
    """Rotate every block into the bases of its sides: x ×_1 Q_1ᵀ … ×_k Q_kᵀ.

        for a matrix:   Q_1ᵀ x Q_2,   and back   Q_1 x Q_2ᵀ

    Args:
        x: (N, d_1, ..., d_k), or without N if block_ndim is 0.
        matrices: one entry per side, (N, d_i, d_i), the basis as columns, or None: left alone.
        back: x ×_1 Q_1 … ×_k Q_k, the inverse if the Q_i are orthogonal.

    >>> Q = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotate(torch.tensor([3.0, 4.0]), [Q]), rotate(torch.tensor([-4.0, 3.0]), [Q], back=True)
    (tensor([-4.,  3.]), tensor([3., 4.]))
    """
    pairs = [None if Q is None else (Q, Q.mT) if back else (Q.mT, Q) for Q in matrices]
    return _mode_products(x, pairs, block_ndim)


def _mode_products(
    x: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor] | None],
    block_ndim: int,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """x ×_1 M_1 … ×_k M_k, with (M_i, M_iᵀ) or None per side."""
    shape, dtype = x.shape, x.dtype
    lead, sides = shape[:block_ndim], shape[block_ndim:]
    if not x.numel():
        return x
    times: Callable[[Tensor, Tensor], Tensor] = matmul
    if product_dtype is not None:
        times = functools.partial(rounded_matmul, dtype=product_dtype)
    if len(sides) == 2:  # each from its own side: a transposed operand is slightly slower
        left, right = pairs
        x = x if left is None else times(left[0], x)
        x = x if right is None else times(x, right[1])
        return x if x.dtype == dtype else x.to(dtype)
    for d, pair in zip(sides, pairs):
        # Each side's axis comes first in its turn, and moves to the end: without a copy, since a
        # product reads a transposed operand in place. With few columns that is so slow that a
        # product with few rows plus a copy takes half the time.
        x = x.reshape(*lead, d, -1)
        if pair is None:
            x = x.mT
        elif d <= _FEW_COLUMNS < x.shape[-1]:
            x = times(pair[0], x).mT
        else:
            x = times(x.mT, pair[1])
    return cast(x.reshape(shape), dtype).contiguous()  # what follows is elementwise
