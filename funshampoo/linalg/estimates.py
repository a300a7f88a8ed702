"""Estimates from products with a few vectors: O(d²) a matrix, where exact values take O(d³)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funshampoo.core.modes import constant
from funshampoo.linalg.products import aligned

PROBES = 8


def largest_eigenvalue(A: Tensor) -> Tensor:
    """λmax (...) of finite positive semidefinite A (..., d, d), from below, by power iterations.

    Exact when the next eigenvalue is a good deal smaller, low by a few percent when it is not.
    Differentiable: the gradient is that of the estimate.
    """
    scale = A.detach().abs().amax((-2, -1), keepdim=True)
    # Homogeneous in A, so the scale is a constant to autograd; it keeps squares in float32's range.
    scale = torch.where(scale > 0, scale, 1.0)
    B = aligned(A / scale)
    return spectral_norm(lambda v: v @ B, A, iterations=24) * scale[..., 0, 0]


def spectral_norm(apply: Callable[[Tensor], Tensor], like: Tensor, iterations: int) -> Tensor:
    """‖R‖₂ (...), from below, of a symmetric operator: apply(v) = v R for v (..., PROBES, d).

        v ← v R / ‖v R‖ from each probe;   ‖R‖₂ ≥ ‖v R‖ / ‖v‖, the largest over the probes

    In n iterations without any gap in the spectrum it comes within a factor of about d^(1/2n). v is
    made of rows because on a CPU products with 8 columns take 4 to 10 times as long as with 8 rows.
    like: (..., d, d), for shape, dtype and device.
    """
    least = torch.finfo(like.dtype).tiny  # where R is zero the estimate is 0 instead of 0/0
    v = probe_vectors(like).expand(*like.shape[:-2], PROBES, like.shape[-1])
    for _ in range(iterations - 1):
        w = apply(v)
        v = w / torch.linalg.vector_norm(w.detach(), dim=-1, keepdim=True).clamp(min=least)
    w, norm = apply(v), torch.linalg.vector_norm(v, dim=-1).clamp(min=least)
    growth: Tensor = torch.linalg.vector_norm(w, dim=-1) / norm
    return growth.amax(-1)


def probe_vectors(like: Tensor) -> Tensor:
    """Fixed pseudo-random vectors (PROBES, d) with entries in [-1, 1].

    Counters through an integer hash (the finalizer of Murmur3), not a random generator: the same on
    every device and in every call, without state, and allowed under vmap and torch.compile. Not
    signs: eigenvectors such as (1, -1) are common, and orthogonal to half of all vectors of signs.
    """
    return _probes(like.shape[-1], like.dtype, like.device)


@constant
def _probes(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return scattered(d * PROBES, dtype, device).reshape(PROBES, d)


def scattered(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,) fixed pseudo-random numbers in [-1, 1], as of `probe_vectors`."""
    bits = torch.arange(1, count + 1, device=device)
    for multiplier, shift in ((0x5BD1E995, 13), (0x6B43A9B5, 15)):  # < 2**31: 32-bit products fit
        bits = bits * multiplier & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    found: Tensor = bits.to(dtype) / 2**31 - 1
    return found
