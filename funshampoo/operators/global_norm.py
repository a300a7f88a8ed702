"""The global norm of many leaves, and clipping factors, even if squares leave the range."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import is_plain
from funshampoo.core.placed import any_in_parts, whole_numbers
from funshampoo.core.tree import cast, compute_dtype
from funshampoo.linalg.norms import (
    is_readable,
    norm_over_axes,
    range_limits,
    range_scale,
    range_shift,
)
from funshampoo.operators.columns import Column, shared_product
from funshampoo.operators.leaf_ops import in_range, sent


def clipping_factors(norm: Tensor, scale: Tensor | None, max_norm: Hyper) -> list[Tensor]:
    """max_norm / max(‖U‖, max_norm): one factor, or two if a single one would leave the range.

    ‖U‖ is norm / scale; a scale of None is 1.
    """
    limit = _limit(max_norm, norm)
    if scale is None:
        factor = limit / torch.maximum(norm, limit)
        if is_readable([factor]) and factor.item() >= _FACTOR:
            return [factor]
        scale = torch.ones_like(norm)
    shift = range_shift(norm.dtype)
    norm = norm + norm * 0.0  # makes inf NaN from here on
    within = norm <= limit * scale
    # A tiny factor is split in two: by the norm's scale, or by that of ordinary gradients.
    large = (scale < 1) | ((scale == 1) & (limit < _FACTOR * norm))
    first = torch.where(large & ~within, 1 / shift, torch.ones_like(norm))
    numerator = limit * (scale / first)
    second = torch.where(within, 1.0, numerator / torch.where(within, 1.0, norm))
    return [first, second]


_FACTOR = 2.0**-60


def _limit(value: Hyper, like: Tensor) -> Tensor:
    """(), filled on its device: a copy from the host would wait for a GPU's stream."""
    if isinstance(value, Tensor):
        return sent(value, like)
    return like.new_full((), in_range(value, like.dtype))


def scaled_norm(leaves: Column) -> tuple[Tensor, Tensor | None]:
    """(‖x s‖, s) of all leaves together, with s a power of two; None instead of s is 1."""
    dtype = functools.reduce(torch.promote_types, {compute_dtype(x) for x in leaves})
    norm = _plain_norm(leaves, dtype)
    least, most = range_limits(dtype)
    if is_readable([norm]) and least <= norm.item() <= most:  # 0 may hide an underflow
        return norm, None
    scale = range_scale(norm)
    scaled = shared_product([cast(x, dtype) for x in leaves], scale)
    return _plain_norm(scaled, dtype), scale


def _plain_norm(leaves: Column, dtype: torch.dtype) -> Tensor:
    given = None if all([x.dtype == dtype for x in leaves]) else dtype
    # torch 2.14 and 2.15 take the dtype for a dimension if leaves are DTensors.
    if is_plain(leaves) and (given is None or not any_in_parts(leaves)):
        norms = list(torch._foreach_norm(leaves, 2, dtype=given))
    else:
        norms = [norm_over_axes(cast(x, dtype), range(x.ndim)) for x in leaves]
    norms = whole_numbers(norms)
    return norm_over_axes(torch.stack([n.to(norms[0].device) for n in norms]), (0,))
