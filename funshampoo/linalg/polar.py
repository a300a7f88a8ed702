"""The orthogonal polar factor of matrices, approximately, by a few odd polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.modes import constant, is_traced, may_reuse, product_precision
from funshampoo.core.tree import cast
from funshampoo.linalg.norms import norm_over_axes, range_limits, unit_scale
from funshampoo.linalg.polynomials import Polynomial
from funshampoo.linalg.products import is_plain_memory, matmul

Norm: TypeAlias = Literal["clamped", "added", "schatten4"]


def polar_factor(
    X: Tensor,
    polynomials: Sequence[Polynomial],
    *,
    epsilon: float = 1e-7,
    norm: Norm = "clamped",
    slack: float = 1.0,
    gram: bool = False,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    """U Vᵀ of X = U Σ Vᵀ, with singular values near 1 in place of Σ, for stacks (..., r, c).

        X ← X / ‖X‖,   then for each (a, b, c):   X ← a X + (b A + c A²) X,   A = X Xᵀ

    on Xᵀ where r > c. Each step maps a singular value x to a x + b x³ + c x⁵.

    Args:
        X: (..., r, c), floating point. A zero matrix stays zero.
        polynomials: (a, b, c) of each step; see `linalg.polynomials`.
        epsilon: keeps the norm from 0. A matrix of much smaller norm gives a small result; with 0
            only the direction matters.
        norm: "clamped": max(‖X‖, epsilon), the Frobenius norm; "added": ‖X‖ + epsilon; "schatten4":
            √‖X Xᵀ‖ + epsilon, the fourth root of the sum of the singular values' fourth powers,
            which is closer to the largest one, so that fewer steps are spent on growing.
        slack: a factor on the Frobenius norm.
        gram: iterate on G = X Xᵀ (r, r) only, Q ← P Q, G ← P G P with P = a I + b G + c G², and
            return Q X: 8 r³ per step instead of 4 r² c + 2 r³, less if c > 2 r. It is the same in
            exact arithmetic, but squares keep half of the digits of small singular values: in
            float32 most entries differ by at most 1e-3 of the largest, at a condition of 1e6 with
            eight steps of Polar Express by 4.5e-2; in float64 by 1e-10.
        dtype: for all operations between X and the result. By default X's; in bfloat16 each
            operation is rounded as in torch.optim.Muon.
        scale: a factor on the result, in X's dtype.

    Returns:
        A new tensor of X's shape and dtype.

    >>> X = torch.diag(torch.tensor([3.0, 4.0]))
    >>> polar_factor(X, [(1.875, -1.25, 0.375)] * 8).round(decimals=3)
    tensor([[1., 0.],
            [0., 1.]])
    """
    with product_precision():
        tall = X.shape[-2] > X.shape[-1]
        inner = dtype or X.dtype
        # Fourth powers, and powers in float16, could leave the range of the dtype.
        narrow = norm == "schatten4" or inner == torch.float16
        scales = narrow or epsilon < range_limits(inner)[0]

        def factor(x: Tensor) -> Tensor:
            own = x.mT if tall else x
            least: float | Tensor = epsilon
            if scales:
                s = unit_scale(own, (-2, -1))
                own, least = own * s, cast(epsilon * s, inner)
            own = cast(own, inner)
            size = _size(own, least, norm, slack)
            # Only a copy may be overwritten.
            in_place = (scales or inner != X.dtype) and may_reuse(own, size)
            P = _factor(own.div_(size) if in_place else own / size, polynomials, gram)
            return P.mT if tall else P

        if X.ndim == 2 or not _one_by_one(X, inner):
            return _scaled(factor(X), scale, X.dtype)
        P = torch.empty_like(X, memory_format=torch.contiguous_format)
        for x, place in zip(X.flatten(0, -3), P.flatten(0, -3)):
            # One copy that transposes and converts takes twice as long as two copies.
            place.copy_(factor(x).contiguous())
        return P if scale == 1.0 else P.mul_(scale)


def polar_flops(r: int, c: int, steps: int, gram: bool = False, norm: Norm = "clamped") -> float:
    """Floating-point operations of the products of `polar_factor` on one r×c matrix.

    >>> polar_flops(2, 3, steps=5)
    320.0
    """
    r, c = min(r, c), max(r, c)
    own = 2.0 * r**2 * c if norm == "schatten4" else 0.0
    if gram:  # the last step makes no G, the first no product P Q
        return own + 4.0 * r**2 * c + (8.0 * steps - 6.0) * r**3
    return own + steps * (4.0 * r**2 * c + 2.0 * r**3)


_SMALL = 64**2


def _one_by_one(X: Tensor, dtype: torch.dtype) -> bool:
    """Whether a CPU is as fast with one matrix at a time.

    It is if they are not small. In half precision it is required, since the kernel, and with it the
    rounding, would depend on their number.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return is_plain_memory(X) and (half or X.shape[-1] * X.shape[-2] >= _SMALL)


def _factor(X: Tensor, polynomials: Sequence[Polynomial], gram: bool) -> Tensor:
    if gram:
        return _on_the_gram_matrix(X, polynomials)
    product = torch.mm if X.ndim == 2 else matmul  # mm doesn't inspect shapes
    for a, b, c in polynomials:
        A = product(X, X.mT)
        X = _combined(X, a, _combined(A, b, A, A, c), X, 1.0)
    return X


def schatten4(X: Tensor) -> Tensor:
    """√‖X Xᵀ‖ (..., 1, 1), the Schatten norm of order 4 of X (..., r, c).

    For zeros it is 0, with derivatives of 0.

    >>> schatten4(1e-20 * torch.eye(16))
    tensor([[2.0000e-20]])
    """
    s = unit_scale(X, (-2, -1))
    return _schatten4(X * s) / s


def _schatten4(X: Tensor) -> Tensor:
    """`schatten4` of an X whose fourth powers are in the range of its dtype."""
    fourth = norm_over_axes(matmul(X, X.mT), (-2, -1), keepdim=True)
    # As in leaf_ops.sqrt: a root has no derivative at zero; this one has 0.
    root = fourth.clamp(min=torch.finfo(fourth.dtype).tiny).sqrt()
    return torch.where(fourth > 0, root, 0.0)


def _size(X: Tensor, epsilon: float | Tensor, norm: Norm, slack: float) -> Tensor:
    """The divisor of X (..., 1, 1); a tensor epsilon is raised to the smallest normal number."""
    if norm == "schatten4":
        size = _schatten4(X) + epsilon
    else:
        size = norm_over_axes(X, (-2, -1), keepdim=True)
        if slack != 1.0:
            size = size * slack
        size = size + epsilon if norm == "added" else size.clamp(min=epsilon)
    return size.clamp(min=torch.finfo(size.dtype).tiny) if isinstance(epsilon, Tensor) else size


def _scaled(P: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale P in this dtype, for a new tensor P.

    On a device it takes one pass, which also makes a transposed matrix contiguous, since the
    following products and sums go by rows.
    """
    if P.is_cpu or is_traced() or P.requires_grad:
        P = cast(P, dtype)
        if scale == 1.0:
            return P
        return P.mul_(scale) if may_reuse(P) else P * scale
    if scale == 1.0:
        return P if P.dtype == dtype else P.to(dtype, memory_format=torch.contiguous_format)
    # Multiplied in the result's dtype, which is at least as wide as P's; contiguous.
    found = torch.empty(P.shape, dtype=dtype, device=P.device)
    return torch.mul(P, _one_number(scale, dtype, P.device), out=found)


@constant
def _one_number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1,): unlike a number, or a tensor (), it takes part in type promotion."""
    return torch.full((1,), value, dtype=dtype, device=device)


def _on_the_gram_matrix(X: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    G = matmul(X, X.mT)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    Q = None
    for i, (a, b, c) in enumerate(polynomials):
        P = a * identity + _combined(G, b, G, G, c)
        Q = P if Q is None else matmul(P, Q)
        if i + 1 < len(polynomials):
            G = matmul(matmul(P, G), P)
    assert Q is not None
    return matmul(Q, X)


def _combined(M: Tensor, beta: float, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """beta M + alpha A B, fused if that is one kernel whose rounding depends on nothing else."""
    if M.ndim == 2:
        return torch.addmm(M, A, B, beta=beta, alpha=alpha)
    if M.ndim == 3 and not M.is_cpu and not is_traced():
        return torch.baddbmm(M, A, B, beta=beta, alpha=alpha)
    return beta * M + alpha * matmul(A, B)
