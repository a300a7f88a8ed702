"""Division by the root of a second moment, as in Adam and related methods.

The second moment is of `gradient`, or of the updates outside a scope. epsilon is outside the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import is_plain
from funshampoo.core.tree import cast
from funshampoo.linalg.products import power
from funshampoo.operators.by_number import by_number
from funshampoo.operators.columns import Column, cast_like, product, quotient
from funshampoo.operators.leaf_ops import filled, on_device, scalar, sqrt

Damping: TypeAlias = Literal["added", "floor"]


def squares_of(g: Column, v: Column) -> Column:
    """G², in V's dtypes, as new tensors."""
    g = cast_like(g, v)
    return product(g, g)


def over_root(
    u: Column,
    v: Column,
    epsilon: Hyper,
    scratch: Column,
    weight: Column | None = None,
    divisor: Column | None = None,
) -> Column:
    """u / divisor / (max(√(v / weight), √tiny) + epsilon), in v's dtypes, with torch.finfo's tiny.

    tiny prevents 0/0 and keeps derivatives finite; a larger epsilon makes it superfluous. It
    overwrites `scratch` if possible: on a CPU a large new tensor costs page faults. Otherwise, and
    for small leaves, foreach operators take one launch, or one C++ loop, for all leaves.
    """
    if isinstance(epsilon, Tensor) or not is_plain(u, v, weight or (), divisor or ()):
        u = cast_like(u if divisor is None else quotient(u, divisor), v)
        corrected = v if weight is None else quotient(v, weight)
        return [cast(y / (sqrt(x) + epsilon), y.dtype) for x, y in zip(corrected, u)]
    # Never on a CPU, where results stay those of version 0.1.
    if weight is not None and not v[0].is_cpu and _joins(v, epsilon, weight, divisor):
        return _by_one_sum(cast_like(u, v), v, epsilon, weight, divisor)
    u = cast_like(u if divisor is None else quotient(u, divisor), v)
    in_scratch = any([x.is_cpu and x.numel() > _SMALL for x in scratch])
    if not in_scratch:
        root = list(torch._foreach_sqrt(v)) if weight is None else quotient(v, weight)
    elif weight is not None:
        root = [torch.div(x, w, out=y) for x, w, y in zip(v, weight, scratch)]
    else:
        root = [torch.sqrt(x, out=y) for x, y in zip(v, scratch)]
    if weight is not None:
        torch._foreach_sqrt_(root)
    least = [torch.finfo(x.dtype).tiny ** 0.5 for x in root]
    if epsilon < max(least):
        torch._foreach_clamp_min_(root, least)
    if epsilon:
        torch._foreach_add_(root, epsilon)
    if in_scratch:
        return [torch.div(x, y, out=y) for x, y in zip(u, root)]
    return list(torch._foreach_div(u, root))


_SMALL = 2**14  # numbers

_FAR = 2.0**20  # epsilon over √tiny: then its product with any weight is above √tiny too


def _joins(v: Column, epsilon: float, weight: Column, divisor: Column | None) -> bool:
    """Whether to use `_by_one_sum`: on a device, where passes over memory dominate a step.

    Not if all leaves are small: it takes more launches.
    """
    if all([x.numel() <= _SMALL for x in v]):
        return False
    for x, *numbers in zip(v, weight, divisor or weight):
        if type(x) is not Tensor or any([n.device != x.device for n in numbers]):
            return False
    least: float = max([torch.finfo(x.dtype).tiny ** 0.5 for x in v])
    return epsilon >= _FAR * least


def _by_one_sum(
    u: Column, v: Column, epsilon: float, weight: Column, divisor: Column | None
) -> Column:
    """u / (divisor √(v / weight) + divisor epsilon): three passes, not five or six, up to rounding.

    In a row without a gradient, u and v are 0 and the divisor is tiny: the sum must not be 0.
    """
    root, factor = list(torch._foreach_sqrt(v)), list(torch._foreach_rsqrt(weight))
    if divisor is None:
        added = [scalar(epsilon, x.dtype, x.device) for x in v]
    else:
        torch._foreach_mul_(factor, divisor)
        added = list(torch._foreach_mul(divisor, epsilon))
        torch._foreach_clamp_min_(added, [torch.finfo(x.dtype).tiny ** 0.5 for x in added])

    def sums(xs: Column, factors: Column, least: Column) -> Column:
        return [torch.addcmul(e, x, f, out=x) for x, f, e in zip(xs, factors, least)]

    def total(x: Tensor, factor: Tensor, least: Tensor) -> Tensor:
        return torch.addcmul(least, x, factor)

    return list(torch._foreach_div(u, by_number(total, root, [factor, added], sums)))


def power_of(
    second: Column, epsilon: Hyper, exponents: Sequence[float], damping: Damping
) -> Column:
    """The divisor; at least a power of the smallest normal number, which prevents 0/0."""
    found = []
    for v, exponent in zip(second, exponents):
        least = on_device(epsilon, v)
        if damping == "floor":
            v = torch.maximum(v, filled(v, epsilon))
        tiny = torch.finfo(v.dtype).tiny
        root = sqrt(v) if exponent == 0.5 else power(torch.clamp(v, min=tiny), exponent)
        found.append(cast(root + least if damping == "added" else root, v.dtype))
    return found
