"""Elementwise operations on columns: lists of tensors, one a leaf.

A column is one call of torch's foreach operators where that can be: the loop over the leaves then
runs in C++, and on a GPU in a few kernels. Their numbers are those of the operators for one tensor.
torch.func has no rules for them, autograd not for all, and hyperparameters that are tensors do not
always fit: then the same operation runs leaf by leaf.

As in `leaf_ops`, only state tensors, `old`, are ever written to, and only where they are donated.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import constant, is_plain
from funshampoo.core.tree import cast, compute_dtype
from funshampoo.operators import leaf_ops

Column: TypeAlias = list[Tensor]


def lerp(old: Column, new: Column, weight: Hyper, donate: bool) -> Column:
    """(1 - weight) old + weight new. The results have old's dtypes."""
    if isinstance(weight, Tensor) or not is_plain(old, new):
        return [leaf_ops.lerp(x, y, weight, donate) for x, y in zip(old, new)]
    if not donate:
        return list(torch._foreach_lerp(old, new, weight))
    torch._foreach_lerp_(old, new, weight)
    return old


def add(old: Column, new: Column, donate: bool = False) -> Column:
    """old + new."""
    if not is_plain(old, new):
        return [leaf_ops.add(x, y, donate) for x, y in zip(old, new)]
    if not donate:
        return list(torch._foreach_add(old, new))
    torch._foreach_add_(old, new)
    return old


def multiply(old: Column, factor: Hyper, donate: bool = False) -> Column:
    """factor old, in old's dtypes whatever the factor's."""
    if isinstance(factor, Tensor) or not is_plain(old):
        return [leaf_ops.multiply(x, factor, donate) for x in old]
    if not donate:
        return list(torch._foreach_mul(old, factor))
    torch._foreach_mul_(old, factor)
    return old


def add_weight(total: Column, beta: Hyper, donate: bool) -> Column:
    """The recursion of an average's total weight: beta total + (1 - beta)."""
    if isinstance(beta, Tensor) or not is_plain(total):
        return [leaf_ops.add_weight(w, beta, donate) for w in total]
    return lerp(total, [_one(w.dtype, w.device) for w in total], 1 - beta, donate)


@constant
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def product(xs: Column, ys: Column) -> Column:
    """Elementwise, new tensors. One operand of a pair may be broadcast."""
    if is_plain(xs, ys):
        return list(torch._foreach_mul(xs, ys))
    return [x * y for x, y in zip(xs, ys)]


def quotient(xs: Column, ys: Column) -> Column:
    """Elementwise, new tensors. The divisors may be broadcast."""
    if is_plain(xs, ys):
        return list(torch._foreach_div(xs, ys))
    return [x / y for x, y in zip(xs, ys)]


def shared_product(xs: Column, factor: Tensor) -> Column:
    """xs times one 0-dimensional tensor of their dtype, new tensors."""
    if is_plain(xs, [factor]) and all([x.device == factor.device for x in xs]):
        return list(torch._foreach_mul(xs, factor))
    return [x * factor.to(x.device) for x in xs]


def clamp(xs: Column, limit: Hyper) -> Column:
    """Entries between -limit and limit, new tensors; NaN stays."""
    if isinstance(limit, Tensor) or not is_plain(xs) or all([x.is_cpu for x in xs]):
        return [leaf_ops.clamp(x, limit) for x in xs]  # both ends in one pass
    limits = [leaf_ops.in_range(limit, x.dtype) for x in xs]
    clamped = list(torch._foreach_clamp_min(xs, [-most for most in limits]))
    torch._foreach_clamp_max_(clamped, limits)
    return clamped


def copied(xs: Column) -> Column:
    """Copies."""
    return [x.clone() for x in xs]


def cast_like(xs: Column, others: Column) -> Column:
    """xs in the dtypes of the others."""
    return [cast(x, other.dtype) for x, other in zip(xs, others)]


def in_compute_dtype(xs: Column) -> Column:
    """xs in float32 at least."""
    return [cast(x, compute_dtype(x)) for x in xs]


def per_block(values: Column, others: Column) -> Column:
    """Views of one value a block, (N,) or (), that broadcast over the others' blocks (N, ...)."""
    return [leaf_ops.per_block(x, other) for x, other in zip(values, others)]
