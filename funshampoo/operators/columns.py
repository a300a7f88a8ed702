"""Elementwise operations on columns: lists of tensors, one per leaf.

A column takes one call of torch's foreach operators if possible: the loop over the leaves then runs
in C++, and on a GPU in a few kernels. Results equal those of the operators on single tensors.
torch.func does not support foreach operators, autograd not all of them, and hyperparameters that
are tensors do not always fit: then the same operation runs leaf by leaf.

As in `leaf_ops`, only state tensors, `old`, are ever written to, and only if they are donated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import is_plain
from funshampoo.core.placed import SEEN, any_in_parts, count_writes
from funshampoo.core.tree import HALF, compute_dtype, map_leaves
from funshampoo.operators import leaf_ops
from funshampoo.operators.by_number import by_number

Column: TypeAlias = list[Tensor]

_LACKS = torch.__version__ < "2.13"
"""Whether this release lacks some foreach operators for DTensors."""


def lerp(old: Column, new: Column, weight: Hyper, donate: bool) -> Column:
    """(1 - weight) old + weight new, in old's dtypes."""
    if (
        isinstance(weight, Tensor)
        or not is_plain(old, new)
        or (_LACKS and SEEN["any"] and any_in_parts(old))
    ):
        return [leaf_ops.lerp(x, y, weight, donate) for x, y in zip(old, new)]
    if not donate:
        return list(torch._foreach_lerp(old, new, weight))
    torch._foreach_lerp_(old, new, weight)
    count_writes(old)
    return old


def add(old: Column, new: Column, donate: bool = False) -> Column:
    """old + new."""
    if not is_plain(old, new):
        return [leaf_ops.add(x, y, donate) for x, y in zip(old, new)]
    if not donate:
        return list(torch._foreach_add(old, new))
    torch._foreach_add_(old, new)
    count_writes(old)
    return old


def add_scaled(xs: Column, ys: Column, factor: Hyper) -> Column:
    """xs + factor ys, as new tensors: on a device in one pass, with that pass's rounding."""
    if isinstance(factor, Tensor) or not is_plain(xs, ys) or any([x.is_cpu for x in xs]):
        # A CPU kernel rounds the product or not depending on an entry's position in the tensor.
        return add(multiply(ys, factor), xs, donate=is_plain(xs, ys))  # the product is new
    return list(torch._foreach_add(xs, ys, alpha=factor))


def multiply(old: Column, factor: Hyper, donate: bool = False) -> Column:
    """factor old, in old's dtypes, whatever the factor's dtype."""
    if isinstance(factor, Tensor) and _lies_with(factor, old):
        factor = factor.to(old[0].dtype)  # one operator for all needs a number of their dtype
    elif isinstance(factor, Tensor) or not is_plain(old):
        return [leaf_ops.multiply(x, factor, donate) for x in old]
    if not donate:
        return list(torch._foreach_mul(old, factor))
    torch._foreach_mul_(old, factor)
    count_writes(old)
    return old


def _lies_with(factor: Tensor, column: Column) -> bool:
    """Whether a number is plain and on the device of these, as a graph on that device reads it."""
    if factor.is_cpu or factor.ndim or not column or not is_plain((factor,), column):
        return False
    kinds = {(x.dtype, x.device) for x in column}
    return len(kinds) == 1 and column[0].device == factor.device and type(column[0]) is Tensor


def add_weight(total: Column, beta: Hyper, alive: Sequence[Column], donate: bool) -> Column:
    """The total weight of an average that only includes what is alive.

        total ← beta total + (1 - beta) alive

    Args:
        alive: [0 or 1 per row], or empty if all are 1.
    """
    if alive:
        return lerp(total, cast_like(alive[0], total), 1 - beta, donate)
    ones, one = [], None
    for w in total:
        if one is None or one.dtype != w.dtype or one.device != w.device:
            one = leaf_ops.scalar(1.0, w.dtype, w.device)
        ones.append(one)
    return lerp(total, ones, 1 - beta, donate)


def average(old: Column, new: Column, beta: Hyper, alive: Sequence[Column], donate: bool) -> Column:
    """beta old + (1 - beta) new.

    Args:
        alive: [0 or 1 per row], or empty if all are 1: a row with 0 stays as it was.
    """
    if not alive:
        return lerp(old, new, 1 - beta, donate)
    shares = [leaf_ops.share(1 - beta, fine, x) for x, fine in zip(old, alive[0])]
    rows = per_block(shares, old)
    return [leaf_ops.lerp(x, y, s, donate) for x, y, s in zip(old, new, rows)]


def average_of(
    old: Column,
    weight: Column,
    new: Column,
    beta: Hyper,
    alive: Sequence[Column],
    donate: bool,
    *,
    by_weight: bool,
    weighted: bool = True,
) -> tuple[Column, Column]:
    """An average, and its total weight.

    Args:
        alive: as in `average`; `new` is 0 in the rows with 0.
        by_weight: the weight counts each row's own gradients: in a row that is not alive it decays
            with the average, which keeps their quotient. Otherwise such a row is left out.
        weighted: False: a sum, beta old + new, whose weight does not change.
    """
    if not weighted:
        return add(decayed(old, beta, alive, donate), new, donate), weight
    if by_weight or not alive:
        return lerp(old, new, 1 - beta, donate), add_weight(weight, beta, alive, donate)
    return average(old, new, beta, alive, donate), add_weight(weight, beta, (), donate)


def zeros_a_block(params: Any, block_ndim: int, dtype: torch.dtype | None = None) -> Any:
    """A tree of (N,) zeros, one per block, in its compute dtype or another."""
    return map_leaves(
        lambda x: x.new_zeros(x.shape[:block_ndim], dtype=dtype or compute_dtype(x)), params
    )


def seen(weight: Column, alive: Sequence[Column]) -> Column:
    """Weights to divide by: not 0 even in a row without any gradient so far, which is not alive."""
    if not alive:
        return weight
    least = [torch.finfo(w.dtype).tiny for w in weight]
    if is_plain(weight) and not (_LACKS and SEEN["any"] and any_in_parts(weight)):
        return list(torch._foreach_clamp_min(weight, least))
    return [torch.clamp(w, min=tiny) for w, tiny in zip(weight, least)]


def corrected(value: Column, weight: Column, alive: Sequence[Column]) -> Column:
    """value / weight; 0 for a row without any gradient so far."""
    return quotient(value, per_block(seen(weight, alive), value))


def decayed(old: Column, beta: Hyper, alive: Sequence[Column], donate: bool) -> Column:
    """beta old, except in rows that are not alive, which stay as they were."""
    if not alive:
        return multiply(old, beta, donate)
    kept = [leaf_ops.kept_share(beta, fine, x) for x, fine in zip(old, alive[0])]
    return [leaf_ops.multiply(x, k, donate) for x, k in zip(old, per_block(kept, old))]


def zeroed(xs: Column, dead: Column) -> Column:
    """xs with zeros where `dead`, a mask per leaf or block, is True; new tensors."""
    masks = per_block(dead, xs)
    plain = is_plain(xs, masks)
    one = leaf_ops.zeroed_by_pairs if plain and xs and not xs[0].is_cpu else leaf_ops.zeroed

    def each(some: Column, masks: Column) -> Column:
        return [one(x, mask) for x, mask in zip(some, masks)]

    return by_number(leaf_ops.zeroed, xs, [masks], each) if plain else each(xs, masks)


def only_alive(xs: Column, alive: Sequence[Column], others: Column | None = None) -> Column:
    """xs, except in rows that are not alive: `others` there, or 0."""
    if not alive:
        return xs
    dead = [fine == 0 for fine in alive[0]]
    if others is None:
        return zeroed(xs, dead)
    return [torch.where(mask, y, x) for mask, x, y in zip(per_block(dead, xs), xs, others)]


def plus(xs: Column, number: float) -> Column:
    """xs + number, as new tensors."""
    return list(torch._foreach_add(xs, number)) if is_plain(xs) else [x + number for x in xs]


def product(xs: Column, ys: Column) -> Column:
    """Elementwise product, as new tensors. One operand of a pair may be broadcast."""
    if is_plain(xs, ys):
        return list(torch._foreach_mul(xs, ys))
    return [x * y for x, y in zip(xs, ys)]


def product_in(old: Column, ys: Column, donate: bool) -> Column:
    """old ys, in old's dtypes."""
    if not is_plain(old, ys):
        return [leaf_ops.multiply(x, y, donate) for x, y in zip(old, ys)]
    if not donate:
        return list(torch._foreach_mul(old, ys))
    torch._foreach_mul_(old, ys)
    count_writes(old)
    return old


def quotient(xs: Column, ys: Column) -> Column:
    """Elementwise quotient, as new tensors. The divisors may be broadcast."""
    if not is_plain(xs, ys):
        return [x / y for x, y in zip(xs, ys)]
    if xs[0].is_cpu:
        return list(torch._foreach_div(xs, ys))
    return by_number(torch.div, xs, [ys], lambda a, b: list(torch._foreach_div(a, b)))


def shared_product(xs: Column, factor: Tensor) -> Column:
    """xs times one 0-dimensional tensor of their dtype, as new tensors."""
    if is_plain(xs, [factor]) and all([x.device == factor.device for x in xs]):
        return list(torch._foreach_mul(xs, factor))
    return [x * factor.to(x.device) for x in xs]


def clamp(xs: Column, limit: Hyper) -> Column:
    """xs clamped to [-limit, limit], as new tensors; NaN stays."""
    if (
        isinstance(limit, Tensor)
        or not is_plain(xs)
        or all([x.is_cpu for x in xs])
        or (_LACKS and SEEN["any"] and any_in_parts(xs))
    ):
        return [leaf_ops.clamp(x, limit) for x in xs]  # both limits in one pass
    limits = [leaf_ops.in_range(limit, x.dtype) for x in xs]
    clamped = list(torch._foreach_clamp_min(xs, [-most for most in limits]))
    torch._foreach_clamp_max_(clamped, limits)
    return clamped


def copied(xs: Column) -> Column:
    """Copies of xs."""
    return [x.clone() for x in xs]


def cast_like(xs: Column, others: Column) -> Column:
    """xs in the dtypes of the others."""
    return [x if x.dtype == y.dtype else x.to(y.dtype) for x, y in zip(xs, others)]


def in_compute_dtype(xs: Iterable[Tensor]) -> Column:
    """xs in float32 or wider."""
    return [x.to(torch.float32) if x.dtype in HALF else x for x in xs]


def per_block(values: Column, others: Column) -> Column:
    """Views of one value per block, (N,) or (), that broadcast over the others' blocks (N, ...)."""
    return [
        x.reshape(x.shape + (1,) * (other.ndim - x.ndim)) if x.ndim else x
        for x, other in zip(values, others)
    ]
