"""Estimates and checks from a few vectors: O(d²) per matrix, where exact values take O(d³)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funshampoo.core.modes import constant
from funshampoo.linalg.norms import row_norms
from funshampoo.linalg.products import aligned, multiply

PROBES = 8
"""Vectors of an estimate of a norm, the largest of what they find."""

CHECKS = 4
"""Vectors of a check. A wrong eigenvector that is nearly orthogonal to all of them is missed: of
random ones, in float32, 4 in 10⁷ at side 512, 6 in 10⁶ at 2,048."""


def largest_eigenvalue(A: Tensor) -> Tensor:
    """λmax (...) of finite positive semidefinite A (..., d, d), by power iterations, from below.

    Exact if the next eigenvalue is much smaller, a few percent low if it is not. Differentiable:
    the gradient is that of the estimate.
    """
    scale = A.detach().abs().amax((-2, -1), keepdim=True)
    # Homogeneous in A, so the scale is a constant to autograd; keeps squares in float32's range.
    scale = torch.where(scale > 0, scale, 1.0)
    B = aligned(A / scale)  # 1 ≤ λmax ≤ d
    return spectral_norm(lambda v: multiply(v, B), A, iterations=24, at_once=4) * scale[..., 0, 0]


def spectral_norm(
    apply: Callable[[Tensor], Tensor], like: Tensor, iterations: int, at_once: int = 1
) -> Tensor:
    """‖R‖₂ (...), from below, of a symmetric operator: apply(v) = v R for v (..., PROBES, d).

        v ← v R / max|v R| from each probe;   ‖R‖₂ ≥ ‖v R‖ / ‖v‖, the largest over the probes

    It divides only after every `at_once` iterations, as a division is three kernels instead of one:
    ‖R‖₂^at_once has to be far inside the dtype's range. It divides by the largest entry, since the
    squares in a norm overflow: v / inf = 0, and R would seem to be 0. If R overflows it is NaN.

    n iterations, even without a gap in the spectrum, come within a factor of about d^(1/2n). v is
    made of rows since on a CPU products with 8 columns take 4 to 10 times as long as with 8 rows.
    like: (..., d, d), for shape, dtype and device.
    """
    least = torch.finfo(like.dtype).tiny  # if R is zero, the estimate is 0 instead of 0/0
    v = probe_vectors(like).expand(*like.shape[:-2], PROBES, like.shape[-1])
    for i in range(1, iterations):
        v = apply(v)
        if i % at_once == 0:
            v = v / v.detach().abs().amax(-1, keepdim=True).clamp(min=least)
    w, norm = apply(v), row_norms(v).clamp(min=least)
    return (row_norms(w) / norm).amax(-1)


def probe_vectors(like: Tensor) -> Tensor:
    """Fixed pseudo-random vectors (PROBES, d) with entries in [-1, 1].

    Counters hashed by an integer hash (Murmur3's finalizer), not a random generator: the same on
    every device and in every call, without state, and allowed under vmap and torch.compile. Entries
    aren't signs: eigenvectors like (1, -1) are common, and orthogonal to half of all sign vectors.
    """
    return _probes(like.shape[-1], like.dtype, like.device)


@constant
def _probes(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return scattered(d * PROBES, dtype, device).reshape(PROBES, d)


def scattered(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,) fixed pseudo-random numbers in [-1, 1], as in `probe_vectors`."""
    bits = torch.arange(1, count + 1, device=device)
    for multiplier, shift in ((0x5BD1E995, 13), (0x6B43A9B5, 15)):  # < 2**31: 32-bit products fit
        bits = bits * multiplier & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    found: Tensor = bits.to(dtype) / 2**31 - 1
    return found


def is_decomposition(A: Tensor, values: Tensor, Q: Tensor) -> Tensor:
    """Whether (...) λ (..., d) and Q (..., d, d) are a decomposition of A (..., d, d).

    Checked with a few vectors v: three products of 4 rows; a decomposition takes nine full ones:

        ‖v Q (Λ/s + 2) Qᵀ - v (A/s + 2)‖ ≤ 8 √ε ‖v‖,   s = max_i |λ_i|

    where ε is the machine epsilon of the dtype. A Q that is not orthogonal passes only if Q (Λ/s +
    2) Qᵀ still happens to be A/s + 2, which no failing routine will produce. LAPACK's errors are a
    few ε. Errors above 8 √ε of the whole are detected, at any side: one eigenvector of 1,000, for
    an eigenvalue near the largest, leaves 0.04. Errors confined to small eigenvalues are not. s is
    at least the smallest normal number, below which rounding is absolute; eigenvalues that are all
    zero belong to no larger matrix.

    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> is_decomposition(A, torch.tensor([1.0, 4.0]), torch.eye(2))
    tensor(True)
    >>> is_decomposition(A, torch.tensor([0.0, 0.0]), torch.eye(2))
    tensor(False)
    """
    # Keeps squares in range.
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    v = probe_vectors(A)[:CHECKS].expand(*A.shape[:-2], CHECKS, A.shape[-1])
    image = multiply(v, Q).mul_((values / scale).add_(2)[..., None, :])
    wanted = multiply(v / scale[..., None], A).add_(v, alpha=2)
    return _is_small(multiply(image, Q.mT).sub_(wanted))


def is_orthogonal(Q: Tensor) -> Tensor:
    """Whether (...) Q (..., d, d) is orthogonal: ‖v Q Qᵀ - v‖ ≤ 8 √ε ‖v‖, as `is_decomposition`.

    >>> is_orthogonal(torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    tensor(True)
    >>> is_orthogonal(torch.full((2, 2), torch.nan))
    tensor(False)
    """
    v = probe_vectors(Q)[:CHECKS]
    return _is_small(v @ Q @ Q.mT - v)


def _is_small(x: Tensor) -> Tensor:
    """Whether (...) ‖x‖ ≤ 8 √ε ‖v‖ for all rows of x (..., CHECKS, d), where v are the probes."""
    norms = torch.linalg.vector_norm(x, dim=x.ndim - 1)  # not -1: see `row_norms`
    small: Tensor = (norms <= _limits(x.shape[-1], x.dtype, x.device)).all(-1)
    return small


@constant
def _limits(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    v = _probes(d, dtype, device)[:CHECKS]
    limits: Tensor = 8 * torch.finfo(dtype).eps ** 0.5 * row_norms(v)
    return limits
