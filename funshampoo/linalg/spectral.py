"""Inverse roots through the eigendecomposition, with finite gradients at tied eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from funshampoo.core.modes import all_true, full_precision, is_traced
from funshampoo.linalg.estimates import is_decomposition, spectral_norm
from funshampoo.linalg.products import aligned, is_plain_memory, multiply, power, square
from funshampoo.linalg.solver import (
    InverseRoot,
    chooser,
    identity_like,
    or_identity,
    replace_nonfinite,
    symmetrize,
)
from funshampoo.linalg.stacked_eigh import stacked_eigh

_RESIDUAL_ITERATIONS = 2
"""Within a factor of 3 at sides up to 1,024. LAPACK converges or says so: this is only a report."""


class Spectrum(NamedTuple):
    """A = Q diag(λ) Qᵀ: λ (..., d) ascending, Q (..., d, d), and which (...) A were decomposed.

    A matrix that was not has the identity's spectrum. Both carry gradients; those of vectors that
    rounding can't tell from their neighbours have no part along these.
    """

    values: Tensor
    vectors: Tensor
    decomposed: Tensor


def decompose(A: Tensor) -> Spectrum:
    """The eigendecomposition of each matrix of A (..., d, d) that is finite and has one.

    What comes back without an error and is none counts as not decomposed; see `is_decomposition`.
    """
    A, finite = replace_nonfinite(A)
    values, vectors, solved = applied(_Decompose, A)
    return Spectrum(values, vectors, finite & solved)


def inverse_root(
    A: Tensor, spectrum: Spectrum, values: Tensor, keep: Tensor | None, p: float
) -> InverseRoot:
    """X = Q diag(λ^(-1/p) where kept, else 0) Qᵀ for A = Q diag(λ) Qᵀ, with its verdict.

    A:        (..., d, d), the damped matrix: gradients of X flow to it alone, and through it to the
              damping.
    spectrum: the decomposition that A's eigenvectors are those of.
    values:   λ (..., d), A's eigenvalues as they are to be used, after any repair: the repair of a
              spectrum that rounding made indefinite is a constant to autograd.
    keep:     (..., d), bool; None: all.
    """
    exponent = 1 / p
    kept = values.detach() if keep is None else torch.where(keep, values.detach(), 1.0)
    smallest, largest = _extremes(kept, keep)
    finite = (largest < torch.inf) & (power(smallest, -exponent) < torch.inf)
    solvable = spectrum.decomposed & finite & (smallest > 0)
    where_solvable = chooser(solvable)
    # What is not chosen below must be finite all the same, for its gradient is 0·it.
    kept = where_solvable(kept, 1.0)
    Q = spectrum.vectors.detach()  # the derivative below has its own formula
    residual = where_solvable(_residual(A.detach(), kept, Q, keep), torch.inf)
    converged = solvable & (residual < torch.inf)
    X = applied(_InversePower, A, kept, values, Q, keep, exponent)
    condition = where_solvable(largest / smallest, torch.inf)
    return InverseRoot(or_identity(converged, X), residual, condition, converged)


def _extremes(kept: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest (...) of the eigenvalues that are kept; 1 where none is."""
    if keep is None:
        return kept.amin(-1), kept.amax(-1)
    where_some = chooser(keep.any(-1))
    smallest = torch.where(keep, kept, torch.inf).amin(-1)
    largest = torch.where(keep, kept, 0.0).amax(-1)
    return where_some(smallest, 1.0), where_some(largest, 1.0)


def _residual(A: Tensor, kept: Tensor, Q: Tensor, keep: Tensor | None) -> Tensor:
    """‖H Qᵀ A Q H - I‖₂ with H = diag(λ^(-1/2)), on the kept eigenvectors."""
    H = _of_kept(kept.rsqrt(), keep)[..., None, :]
    A, Q = aligned(A), aligned(Q)

    def apply(v: Tensor) -> Tensor:
        image = multiply(multiply(multiply(v * H, Q.mT), A), Q) * H
        return image - (v if keep is None else v * keep[..., None, :])

    return spectral_norm(apply, A, _RESIDUAL_ITERATIONS)


def _of_kept(f: Tensor, keep: Tensor | None) -> Tensor:
    return f if keep is None else torch.where(keep, f, 0.0)


def applied(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(...)`; its forward alone, 0.1 ms cheaper, where no derivative is wanted."""
    wanted = torch.is_grad_enabled() and any(
        [isinstance(x, Tensor) and x.requires_grad for x in arguments]
    )
    call = function.apply if wanted or is_traced() else function.forward
    return call(*arguments)  # type: ignore[no-untyped-call]


class _Decompose(Function):
    """A -> λ, Q, solved, with dA = Q (diag(dλ) + F ∘ (Qᵀ dQ)) Qᵀ, F_ij = 1 / (λ_j - λ_i).

    F_ij is 0 at a tie: no basis of the eigenspace is more A's than another.
    """

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, ...]:
        d = A.shape[-1]
        if d % 2 == 0 or d == 1 or not is_plain_memory(A):
            return _verified(A, *stacked_eigh(A))
        # MKL rounds a matrix differently where it is not aligned: in a stack of even sides all are.
        # One that is alone is treated alike, to be what it is in a stack.
        values, vectors, solved = stacked_eigh(_bordered(A))
        return _verified(A, values[..., :d].contiguous(), vectors[..., :d, :d], solved)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        values, vectors, solved = output
        ctx.mark_non_differentiable(solved)
        ctx.save_for_backward(values, vectors)

    @staticmethod
    def backward(ctx: Any, d_values: Tensor, d_vectors: Tensor, *_: Tensor) -> Tensor:
        values, Q = ctx.saved_tensors
        gap = values[..., None, :] - values[..., :, None]
        info = torch.finfo(gap.dtype)
        rounding = values.shape[-1] * info.eps * values.abs().amax(-1)[..., None, None]
        apart = gap.abs() > rounding.clamp(min=info.tiny)
        inverse = torch.where(apart, 1 / torch.where(apart, gap, 1.0), 0.0)
        with full_precision():
            inside = torch.diag_embed(d_values) + inverse * (Q.mT @ d_vectors)
            dA = Q @ inside @ Q.mT
        return first_order(symmetrize(dA), values)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int], A: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        # One stack more: so forward never sees a batched tensor, and can isolate failures here too.
        return _Decompose.apply(A.movedim(in_dims[0], 0)), 0  # type: ignore[no-untyped-call]


def _verified(A: Tensor, values: Tensor, Q: Tensor, solved: Tensor) -> tuple[Tensor, ...]:
    """The same, with the identity's spectrum in the place of what is none of A's."""
    with full_precision():
        right = is_decomposition(A, values, Q)
    if right.device.type == "cpu" and all_true(right):
        return values, Q, solved
    choose = chooser(right)
    Q = choose(Q.mT, identity_like(A)).mT  # column by column, as it was
    return choose(values, 1.0), Q, solved & right


def _bordered(A: Tensor) -> Tensor:
    """[[A, 0], [0, s]] with s above A's eigenvalues (..., d + 1, d + 1).

    Its decomposition is A's, and s with the last unit vector. Nothing mixes the two: a zero between
    them is where LAPACK splits a matrix.
    """
    bound = A.abs().sum(-1).amax(-1)
    above = torch.where(bound > 0, 1.5 * bound, 1.0).clamp(max=torch.finfo(A.dtype).max)
    bordered = pad(A, (0, 1, 0, 1))
    bordered[..., -1, -1] = above
    return bordered


class _InversePower(Function):
    """A -> X = Q diag(f) Qᵀ, f_i = λ_i^(-α) where kept, else 0, for A = Q diag(λ) Qᵀ.

    Computed as B Bᵀ with B = Q diag(√f): symmetric, from one scaled copy of Q.

    The derivative is the Daleckii-Krein form, dA = Q (Γ ∘ (Qᵀ sym(dX) Q)) Qᵀ with Γ the divided
    differences of f (Higham, Functions of Matrices, 2008, theorem 3.11). It is taken with respect
    to A only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        A: Tensor, kept: Tensor, values: Tensor, Q: Tensor, keep: Tensor | None, exponent: float
    ) -> Tensor:
        return square(Q * _of_kept(power(kept, -exponent / 2), keep)[..., None, :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, kept, values, Q, keep, ctx.exponent = inputs
        ctx.save_for_backward(kept, values, Q, keep)

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, Q, keep = ctx.saved_tensors
        keep = torch.ones_like(kept, dtype=torch.bool) if keep is None else keep
        differences = _divided_differences(kept, values, keep, ctx.exponent)
        with full_precision():
            dA = Q @ (differences * (Q.mT @ symmetrize(dX) @ Q)) @ Q.mT
        return first_order(symmetrize(dA), values), None, None, None, None, None


def _divided_differences(kept: Tensor, values: Tensor, keep: Tensor, exponent: float) -> Tensor:
    """Γ (..., d, d) = (f_i - f_j) / (λ_i - λ_j), or f'(λ_i) at a tie, free of cancellation.

    For two kept eigenvalues λ_s ≤ λ_l, with r = log(λ_l / λ_s):
        Γ = (f_s / λ_s) expm1(-αr) / expm1(r), which tends to -α f_s / λ_s = f'(λ_s) as r -> 0.
    A kept and a dropped eigenvalue are never equal: Γ = f_i / (λ_i - λ_j). Two dropped ones: 0.
    """
    log = kept.log()
    r = (log[..., :, None] - log[..., None, :]).abs()
    tied = r == 0
    ratio = torch.where(
        tied, -exponent, torch.expm1(-exponent * r) / torch.expm1(torch.where(tied, 1.0, r))
    )
    slope = kept.pow(-exponent) / kept  # falls with λ: the larger of two is that of λ_s
    both_kept = torch.maximum(slope[..., :, None], slope[..., None, :]) * ratio

    f = torch.where(keep, kept.pow(-exponent), 0.0)
    gap = values[..., :, None] - values[..., None, :]
    one_kept = keep[..., :, None] ^ keep[..., None, :]
    across = (f[..., :, None] - f[..., None, :]) / torch.where(one_kept & (gap != 0), gap, 1.0)
    return torch.where(one_kept, across, torch.where(keep[..., :, None], both_kept, 0.0))


class _FirstOrder(Function):
    """The identity on a gradient; differentiating it again is an error.

    What is saved for it are constants to autograd, so second derivatives would silently lack terms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, values: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "roots and bases by decompositions have first derivatives only; "
            "use newton_schulz() or coupled_newton() for second derivatives"
        )


def first_order(gradient: Tensor, values: Tensor) -> Tensor:
    """`gradient`, guarded; `values` tie it to the matrix that it is the gradient at."""
    guarded: Tensor = _FirstOrder.apply(gradient, values)  # type: ignore[no-untyped-call]
    return guarded
