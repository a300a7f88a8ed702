"""Norms of blocks, correct even where their squares leave the range of the dtype.

A plain norm overflows from 2^64 on in float32 and loses digits below about 2^-42, although the norm
itself would be representable. Its own value shows that: inf, or tiny. Then x is multiplied by a
power of two, which rounds nothing, and the norm is computed again: ‖x‖ = ‖x s‖ / s.

On a CPU the plain norms are read, and a second pass is made only if one is out of range. Under a
transform and in a graph there is no value yet: the second pass is always made, with s = 1 where the
first was right, so that those numbers are the plain norm's. On other devices reading would wait,
and a second pass over all blocks on every step is too expensive for values that `guarded` gradients
never reach: there the plain norm is used as is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funshampoo.core.modes import is_differentiated, is_plain, is_traced
from funshampoo.core.placed import is_in_parts, whole_numbers


def norm_over_axes(x: Tensor, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    """‖x‖ over these axes, with all derivatives, of every order, 0 where x is zeros.

    torch does this for the first derivative, but the second one is NaN if the first was in reverse
    mode. A block has no gradient while another weight is still zeros, as at the start of LoRA.

    >>> from torch.func import grad
    >>> grad(grad(lambda t: norm_over_axes(t * torch.zeros(2), (0,))))(torch.tensor(1.0))
    tensor(0.)
    """
    axes, zero = tuple(axes), None
    if is_differentiated(x) and not is_in_parts(x):
        zero = torch.linalg.vector_norm(x.detach(), dim=axes, keepdim=True) == 0
        x = x.masked_fill(zero, 1.0)
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)
    return norm if zero is None else norm.masked_fill(zero.reshape(norm.shape), 0.0)


def block_norm(x: Tensor, block_ndim: int, plain: bool = False) -> Tensor:
    """‖x‖ per block: (N,) for x (N, ...) if block_ndim is 1, () if it is 0.

    plain: whether it is known that no derivative is needed.

    In one pass. Squares that overflow make it inf, squares that underflow 0: see `range_scale`.

    >>> block_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 1)
    tensor([5., 1.])
    """
    if type(x) is not Tensor and is_in_parts(x):  # it can't be flattened
        of_parts: Tensor = torch.linalg.vector_norm(x)
        return of_parts
    flat = x.reshape(*x.shape[:block_ndim], -1)
    if flat.shape[-1] == 1:  # same value, but its derivative is a sign, not a quotient
        return flat[..., 0].abs()
    if plain:
        norms: Tensor = torch.linalg.vector_norm(flat, dim=-1)  # length is not 1; see row_norms
        return norms
    return norm_over_axes(flat, (flat.ndim - 1,))


def row_norms(x: Tensor) -> Tensor:
    """‖x‖ (...) of x (..., n), over its last axis.

    The axis is counted from the front: over an axis -1 of length 1, torch 2.8 to 2.11 (not 2.13)
    gives the norm the shape (..., 1), in a graph and on the meta device.

    >>> row_norms(torch.zeros(2, 1, device="meta")).shape
    torch.Size([2])
    """
    return norm_over_axes(x, (x.ndim - 1,))


def range_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Limits within which norms neither overflow nor lose digits: about 2^-42, 2^64 in float32."""
    found = torch.finfo(dtype)
    return found.tiny ** (1 / 3), found.max**0.5


def range_shift(dtype: torch.dtype) -> float:
    """Power of two that brings squares into range: 2^96 in float32, whose exponents end at 128."""
    return float(2.0**600) if dtype == torch.float64 else float(2.0**96)


def range_scale(norm: Tensor) -> Tensor:
    """s, a power of two for every plain norm, so that ‖x s‖ is correct; 1 where `norm` already is.

    Infinite or NaN entries stay so. No derivative passes.

    >>> range_scale(torch.tensor([0.0, 1.0, float("inf")])).log2()
    tensor([ 96.,   0., -96.])
    """
    norm = norm.detach()
    shift, (least, _) = range_shift(norm.dtype), range_limits(norm.dtype)
    scale = torch.ones_like(norm).masked_fill(norm < least, shift)
    return scale.masked_fill(norm == float("inf"), 1 / shift)


def unit_scale(x: Tensor, axes: Sequence[int]) -> Tensor:
    """s, a power of two: the largest entry of x s over these axes is in [1/2, 1).

    For powers beyond squares, or where every device must be safe; it takes a pass over x. It is 1
    where x is zeros, or not finite. x s rounds nothing, and no derivative passes. Axes are kept.

    >>> unit_scale(torch.tensor([3.0, 1e-30]), (0,)), unit_scale(torch.zeros(2), (0,))
    (tensor([0.2500]), tensor([1.]))
    """
    axes = tuple(axes)
    if is_in_parts(x) or not x.numel():
        return x.new_ones(
            [1 if i - x.ndim in axes or i in axes else n for i, n in enumerate(x.shape)]
        )
    largest = x.detach().abs().amax(axes, keepdim=True)
    # 2^-exponent has to be representable even if the largest entry is subnormal.
    least = math.frexp(torch.finfo(x.dtype).tiny)[1]
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest)[1].clamp(min=least))


def block_norms(xs: Sequence[Tensor], block_ndim: int) -> list[Tensor]:
    """`block_norm` of each, in one launch outside block space."""
    plain = is_plain(xs)
    if block_ndim or not xs or not plain:  # foreach operators reject an empty list
        found = [block_norm(x, block_ndim, plain) for x in xs]
    else:
        found = list(torch._foreach_norm(list(xs)))
    return found if block_ndim else whole_numbers(found)


def is_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may read these without waiting: on a CPU, and outside transforms."""
    return not is_traced() and all([type(x) is Tensor and x.is_cpu for x in tensors])


def stand(norms: Sequence[Tensor], xs: Sequence[Tensor]) -> bool:
    """Whether these plain norms, (N,) or (), can be used as they are, without a second pass.

    Also if the host would have to wait to find out. A norm of 0 is right only for a block of zeros.
    """
    if not is_readable(norms):
        return not is_traced() and not all([norm.is_cpu for norm in norms])
    found_zero = False
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for norm in norms:
        kinds.setdefault(norm.dtype, []).append(norm)
    for dtype, alike in kinds.items():
        together = torch.cat(alike) if alike[0].ndim else torch.stack(alike)
        if not together.numel():
            continue
        few = together.numel() <= _FEW  # these take less time than an operator
        ends = together.tolist() if few else [end.item() for end in together.aminmax()]
        least, most = range_limits(dtype)
        if all([least <= x <= most for x in ends]):  # NaN is not
            continue
        zero = together == 0
        inside = (together >= least) & (together <= most)
        if not bool((inside | zero).all()):
            return False
        found_zero = True
    if not found_zero:
        return True
    # Every block with a norm of 0 has only zeros.
    return not any([bool((n == 0).any()) and bool(x[n == 0].any()) for x, n in zip(xs, norms)])


_FEW = 64
