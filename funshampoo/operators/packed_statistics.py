"""The update of packed factor matrices: three products of halves instead of a whole one."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import constant, may_reuse
from funshampoo.linalg.products import aligned, gram, is_plain_memory, matmul
from funshampoo.operators.leaf_ops import LARGE, LONG, add, multiply
from funshampoo.operators.packed import is_of_first, join, packed_shape


def add_packed_gram(old: Tensor, x: Tensor, beta: Hyper, weight: Hyper, donate: bool) -> Tensor:
    """beta old + weight x xᵀ, packed, old (..., h, 2r + 1), x (..., d, n).

    With x = [x1; x2], of h and r rows: A = x1 x1ᵀ, B = x1 x2ᵀ, C = x2 x2ᵀ (see `operators.packed`).
    """
    if isinstance(beta, Tensor) or isinstance(weight, Tensor) or not may_reuse(old, x):
        added = multiply(join(*_parts(x)), weight, donate=False)
        return add(multiply(old, beta, donate), added, donate)
    large = x.ndim == 3 and x.shape[-2] >= LARGE and x.shape[-1] >= LONG
    if large and x.shape[-2] % 8 == 0 and is_plain_memory(old, x):
        return _add_panels(old if donate else old.clone(), aligned(x), beta, weight)
    A, B, C = _parts(x)
    new = multiply(old, beta, donate)
    columns = C.shape[-1] + 1
    new[..., columns:].add_(B, alpha=weight)
    _add_corner(new[..., :columns], A, C, weight)
    return new


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, C."""
    h = packed_shape(x.shape[-2])[0]
    x1, x2 = x[..., :h, :], x[..., h:, :]
    if x2.shape[-2] == 0:  # d = 1
        return gram(x1), x1[..., :0], x1[..., :0, :0]
    return gram(x1), matmul(x1, x2.mT), gram(x2)


def _add_corner(T: Tensor, A: Tensor, C: Tensor, weight: float) -> None:
    """T ← T + weight (A's lower triangle, and C's upper one, shifted one column to the right)."""
    h, r = A.shape[-1], C.shape[-1]
    T[..., :h].addcmul_(A, _places_of_first(h, r, T.dtype, T.device), value=weight)
    T[..., :r, 1:].addcmul_(C, _places_of_second(h, r, T.dtype, T.device), value=weight)


@constant
def _places_of_first(h: int, r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(h, h), 1 where T holds an entry of A, else 0."""
    return is_of_first(h, r, device)[:, :h].to(dtype)


@constant
def _places_of_second(h: int, r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(r, r), 1 where T holds an entry of C, else 0."""
    return (~is_of_first(h, r, device)[:r, 1:]).to(dtype)


_PANEL = 128  # rows


def _add_panels(old: Tensor, x: Tensor, beta: float, weight: float) -> Tensor:
    """In place, by panels of T's rows, so that little more than half of A and C is computed.

    A panel has three parts: A's left of the diagonal, C's right of it, and a square that they
    share. With sides that are multiples of 8 all rows start at multiples of 16 bytes.
    """
    h = x.shape[-2] // 2
    x1, x2 = x[:, :h], x[:, h:]
    old[:, :, h + 1 :].baddbmm_(x1, x2.mT, beta=beta, alpha=weight)
    for first in range(0, h, _PANEL):
        last = min(first + _PANEL, h)
        rows = old[:, first:last]
        a, c = x1[:, first:last], x2[:, first:last]
        rows[:, :, :first].baddbmm_(a, x1[:, :first].mT, beta=beta, alpha=weight)
        rows[:, :, last + 1 : h + 1].baddbmm_(c, x2[:, last:].mT, beta=beta, alpha=weight)
        square = rows[:, :, first : last + 1].mul_(beta)
        _add_corner(square, a @ a.mT, c @ c.mT, weight)
    return old
