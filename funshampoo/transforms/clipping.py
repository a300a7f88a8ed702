"""Clipping: of every entry, or of the whole tree's norm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.modes import is_plain
from funshampoo.core.placed import any_in_parts, whole_numbers
from funshampoo.core.tree import cast, compute_dtype, flatten, update_columns
from funshampoo.linalg.norms import (
    is_readable,
    norm_over_axes,
    range_limits,
    range_scale,
    range_shift,
)
from funshampoo.operators.columns import Column, clamp, in_compute_dtype, shared_product
from funshampoo.operators.leaf_ops import in_range, sent


def clip(max_value: Hyper) -> GradientTransformation:
    """U ← min(max(U, -max_value), max_value), entry by entry.

    Raises:
        ValueError: max_value is a number that is not above 0.

    >>> import torch
    >>> clip(1.0).update({"w": torch.tensor([0.5, -3.0])}, ())[0]
    {'w': tensor([ 0.5000, -1.0000])}
    """
    check_range("max_value", max_value, 0.0, low_open=True)

    def clipped(updates: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        limit = number(max_value, hyper)

        def clamped(u: Column) -> tuple[Column]:
            return (clamp(in_compute_dtype(u), limit),)

        return update_columns(clamped, updates, ())[0]

    return stateless(clipped, "clip", numbers=[max_value], elementwise=True)


def clip_by_global_norm(max_norm: Hyper) -> GradientTransformation:
    """U ← U max_norm / max(‖U‖, max_norm), with the norm over the whole tree.

    Where the norm is at most max_norm nothing changes, bit for bit. It is right also where squares
    leave the range of U's dtype: entries of 1e30 are clipped in float32 as in float64. NaN or inf
    anywhere makes every entry NaN, as it should be seen; `multi_steps` leaves such gradients out.
    A max_norm of 0, injected, leaves zeros.

    Raises:
        ValueError: max_norm is a number that is not above 0.

    Reference: Pascanu, Mikolov, Bengio, arXiv 1211.5063.

    >>> import torch
    >>> clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, ())[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_range("max_norm", max_norm, 0.0, low_open=True)

    def clipped(updates: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        leaves = [x for x in flatten(updates)[0] if x is not None]
        if not leaves:
            return updates
        factors = _clipping_factors(*_scaled_norm(leaves), number(max_norm, hyper))

        def scaled(u: Column) -> tuple[Column]:
            dtypes = [compute_dtype(x) for x in u]
            for factor in factors:
                u = shared_product([cast(x, factor.dtype) for x in u], factor)
            return ([cast(x, dtype) for x, dtype in zip(u, dtypes)],)

        return update_columns(scaled, updates, ())[0]

    return stateless(clipped, "clip_by_global_norm", numbers=[max_norm])


def _clipping_factors(norm: Tensor, scale: Tensor | None, max_norm: Hyper) -> list[Tensor]:
    """max_norm / max(‖U‖, max_norm), as one factor or as two where one would leave the range.

    ‖U‖ is norm / scale; a scale of None is 1.
    """
    limit = _limit(max_norm, norm)
    if scale is None:
        factor = limit / torch.maximum(norm, limit)
        if is_readable([factor]) and factor.item() >= _FACTOR:
            return [factor]
        scale = torch.ones_like(norm)
    shift = range_shift(norm.dtype)
    norm = norm + norm * 0.0  # inf is NaN from here on
    within = norm <= limit * scale
    # A factor that would be tiny is two: of the norm's scale, or of that of ordinary gradients.
    large = (scale < 1) | ((scale == 1) & (limit < _FACTOR * norm))
    first = torch.where(large & ~within, 1 / shift, torch.ones_like(norm))
    numerator = limit * (scale / first)
    second = torch.where(within, 1.0, numerator / torch.where(within, 1.0, norm))
    return [first, second]


_FACTOR = 2.0**-60


def _limit(value: Hyper, like: Tensor) -> Tensor:
    """(), filled on its device: a GPU's stream would be waited for with a copy from the host."""
    if isinstance(value, Tensor):
        return sent(value, like)
    return like.new_full((), in_range(value, like.dtype))


def global_norm(tree: Tree) -> Tensor | None:
    """√Σ‖leaf‖², on the first leaf's device, in the widest dtype; None for a tree without tensors.

    Right wherever it is a number of its dtype: squares may leave the range.

    >>> import torch
    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    leaves = [x for x in flatten(tree)[0] if x is not None]
    if not leaves:
        return None
    norm, scale = _scaled_norm(leaves)
    return norm if scale is None else norm / scale


def _scaled_norm(leaves: Column) -> tuple[Tensor, Tensor | None]:
    """(‖x s‖, s) of all leaves together, s a power of two; None in its place is 1."""
    dtype = functools.reduce(torch.promote_types, {compute_dtype(x) for x in leaves})
    norm = _plain_norm(leaves, dtype)
    least, most = range_limits(dtype)
    if is_readable([norm]) and least <= norm.item() <= most:  # 0 may hide something
        return norm, None
    scale = range_scale(norm)
    scaled = shared_product([cast(x, dtype) for x in leaves], scale)
    return _plain_norm(scaled, dtype), scale


def _plain_norm(leaves: Column, dtype: torch.dtype) -> Tensor:
    given = None if all([x.dtype == dtype for x in leaves]) else dtype
    # torch 2.14 and 2.15 take the dtype for a dimension where leaves are DTensors.
    if is_plain(leaves) and (given is None or not any_in_parts(leaves)):
        norms = list(torch._foreach_norm(leaves, 2, dtype=given))
    else:
        norms = [norm_over_axes(cast(x, dtype), range(x.ndim)) for x in leaves]
    norms = whole_numbers(norms)
    return norm_over_axes(torch.stack([n.to(norms[0].device) for n in norms]), (0,))
