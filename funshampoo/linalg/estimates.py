"""Estimates from products with a few vectors: O(d²) a matrix, where the quantity itself would take O(d³)."""

from __future__ import annotations

import torch
from torch import Tensor

PROBES = 8
POWER_ITERATIONS = 24


def probe_vectors(A: Tensor) -> Tensor:
    """V (d, PROBES): fixed pseudo-random columns of length √d, so that V Vᵀ / PROBES is close to the identity.

    Counters through an integer hash (the finalizer of Murmur3), not a random generator: the same on every device and in
    every call, with no state, and allowed under vmap and torch.compile. Entries are not ±1, because eigenvectors such
    as (1, -1) are common in practice and exactly orthogonal to many a vector of signs.
    """
    d = A.shape[-1]
    bits = torch.arange(1, d * PROBES + 1, device=A.device)
    for multiplier, shift in ((0x5BD1E995, 13), (0x6B43A9B5, 15)):  # below 2**31: 32 bits times it fit in int64
        bits = bits * multiplier & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    # Half a unit off center: no entry, and so for d = 1 no column, is zero.
    V = ((bits.double() + 0.5) / 2**31 - 1).reshape(PROBES, d).mT
    return (V * (d**0.5 / torch.linalg.vector_norm(V, dim=0))).to(A.dtype)


def largest_eigenvalue(A: Tensor) -> Tensor:
    """λmax (...) of finite positive semidefinite A (..., d, d), from below, by power iterations from each probe.

    v ← A v / ‖A v‖, λ = vᵀAv / vᵀv, the largest over the probes. Exact for a gap of a few percent below λmax; without a
    gap at the top, low by a few percent at most in practice. Differentiable: the gradient is that of the estimate.
    """
    scale = A.detach().abs().amax((-2, -1), keepdim=True)
    # Homogeneous in A, so the scale is a constant to autograd; it keeps squares within float32's range.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    B = A / scale
    v = probe_vectors(A)
    for _ in range(POWER_ITERATIONS):
        w = B @ v
        norm = torch.linalg.vector_norm(w.detach(), dim=-2, keepdim=True)
        v = torch.where(norm > 0, w / torch.where(norm > 0, norm, torch.ones_like(norm)), v)
    rayleigh = (v * (B @ v)).sum(-2) / (v * v).sum(-2)
    return rayleigh.amax(-1) * scale[..., 0, 0]


def largest_row_norm(RV: Tensor) -> Tensor:
    """Estimate max_i ‖R_i‖₂ (...) from R V (..., d, PROBES), V the probe vectors, as max_i √(mean_k (RV)²_ik).

    In expectation over V, the mean over k is ‖R_i‖²; exact for d = 1. ‖R‖_max ≤ max_i ‖R_i‖₂ ≤ ‖R‖₂.
    """
    return RV.square().mean(-1).sqrt().amax(-1)
