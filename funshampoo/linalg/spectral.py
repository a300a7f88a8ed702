"""Inverse roots by eigendecomposition, with finite gradients at tied eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad
from torch.nn.functional import pad

from funshampoo.core.modes import all_true, full_precision, is_differentiated, is_traced
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
"""Within a factor of 3 at sides up to 1,024. Only a report: LAPACK itself reports failures."""


class Spectrum(NamedTuple):
    """A = Q diag(λ) Qᵀ: λ (..., d) ascending, Q (..., d, d), and which (...) A were decomposed.

    Matrices that failed have the identity's spectrum. `values` and `vectors` carry derivatives:

        dλ = diag(C),   dQ = Q (F ∘ C),   C = Qᵀ dA Q,   F_ij = 1 / (λ_j - λ_i)

    F_ij is 0 if the gap is within rounding, d ε |λ|max with ε the machine epsilon: eigenvectors
    have no derivative at a tie, where any basis of the eigenspace is as good as another.
    """

    values: Tensor
    vectors: Tensor
    decomposed: Tensor


class NearSpectrum(NamedTuple):
    """`Spectrum`, except that matrices (...) with `exact` False have an older basis."""

    values: Tensor
    vectors: Tensor
    decomposed: Tensor
    exact: Tensor


AnySpectrum: TypeAlias = Spectrum | NearSpectrum


def decompose(A: Tensor) -> Spectrum:
    """The eigendecomposition of each matrix of A (..., d, d) that is finite and has one.

    A wrong result counts as a failure even if no error was raised: see `is_decomposition`.
    """
    A, finite = replace_nonfinite(A)
    values, vectors, solved = applied(_Decompose, A)
    return Spectrum(values, vectors, finite & solved)


def inverse_root(
    A: Tensor, spectrum: AnySpectrum, values: Tensor, keep: Tensor | None, p: float
) -> InverseRoot:
    """X = Q diag(λ^(-1/p) where kept, else 0) Qᵀ for A = Q diag(λ) Qᵀ, with its verdict.

    A:        (..., d, d), the damped matrix: gradients of X flow only to it, and through it to the
              damping. If the spectrum is not exact they flow through its values and vectors.
    spectrum: the decomposition whose eigenvectors are A's.
    values:   λ (..., d), A's eigenvalues to use, after any repair: the repair of a spectrum that
              rounding made indefinite is a constant to autograd.
    keep:     (..., d), bool; None: all.
    """
    exponent = 1 / p
    kept = values.detach() if keep is None else torch.where(keep, values.detach(), 1.0)
    smallest, largest = _extremes(kept, keep)
    finite = (largest < torch.inf) & (power(smallest, -exponent) < torch.inf)
    solvable = spectrum.decomposed & finite & (smallest > 0)
    where_solvable = chooser(solvable)
    # What is not chosen below must still be finite, since the gradient includes 0 times it.
    kept = where_solvable(kept, 1.0)
    Q = spectrum.vectors.detach()
    residual = where_solvable(_residual(A.detach(), kept, Q, keep), torch.inf)
    converged = solvable & (residual < torch.inf)
    X = applied(_InversePower, A, kept, values, Q, keep, exponent)
    if isinstance(spectrum, NearSpectrum) and is_differentiated(A, values, spectrum.vectors):
        used = where_solvable(values if keep is None else torch.where(keep, values, 1.0), 1.0)
        approximate = _InversePower.forward(A, used, values, spectrum.vectors, keep, exponent)
        X = torch.where(spectrum.exact[..., None, None], X, approximate)
    condition = where_solvable(largest / smallest, torch.inf)
    return InverseRoot(or_identity(converged, X), residual, condition, converged)


def _extremes(kept: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest (...) of the kept eigenvalues; 1 where none is kept."""
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
    """`function.apply(...)`; only its forward, 0.1 ms faster, if no derivative is needed."""
    call = function.apply if is_traced() or is_differentiated(*arguments) else function.forward
    return call(*arguments)


def saved(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for derivatives in both directions."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def check_forward_once() -> None:
    """To be called by a `jvp` whose saved tensors have no tangent of another forward transform.

    Raises:
        NotImplementedError: an enclosing forward transform exists.
    """
    levels = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    if levels.count(_functorch.TransformType.Jvp) > 1:
        raise NotImplementedError(
            "forward mode over forward mode, as jacfwd(jacfwd(...)), does not go through a "
            "decomposition: use jacfwd(jacrev(...)), as torch.func.hessian does"
        )


class _Decompose(Function):
    """A -> λ, Q, solved; with `Spectrum`'s derivatives.

    Backward: dA = Q (diag(dλ) + F ∘ (Qᵀ dQ)) Qᵀ.
    """

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, ...]:
        d = A.shape[-1]
        if d % 2 == 0 or d == 1 or not is_plain_memory(A):
            return _verified(A, *stacked_eigh(A))
        # MKL rounds a matrix differently if it is not aligned; in a stack of even sides all are. A
        # single matrix gets the same treatment, to match its result in a stack.
        values, vectors, solved = stacked_eigh(_bordered(A))
        vectors = vectors[..., :d, :d]
        if forward_ad._current_level >= 0:  # torch rejects a view that was made in here
            vectors = vectors.clone()
        return _verified(A, values[..., :d].clone(), vectors, solved)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        values, vectors, solved = output
        ctx.mark_non_differentiable(solved)
        ctx.set_materialize_grads(False)  # roots do not use gradients of Q
        saved(ctx, values, vectors)

    @staticmethod
    def backward(ctx: Any, d_values: Tensor | None, dQ: Tensor | None, _: Any) -> Tensor | None:
        values, Q = ctx.saved_tensors
        if d_values is None and dQ is None:
            return None
        with full_precision():
            turned = 0 if d_values is None else Q * d_values[..., None, :]
            if dQ is not None:
                turned = turned + Q @ (_inverse_gaps(values) * (Q.mT @ dQ))
            dA = turned @ Q.mT
        return symmetrize(dA)

    @staticmethod
    def jvp(ctx: Any, dA: Tensor) -> tuple[Tensor, Tensor, None]:
        check_forward_once()
        values, Q = ctx.saved_tensors
        with full_precision():
            C = Q.mT @ symmetrize(dA) @ Q
            return C.diagonal(dim1=-2, dim2=-1), Q @ (_inverse_gaps(values) * C), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int], A: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        # Add a stack axis: forward never sees a batched tensor, and can isolate failures here too.
        return _Decompose.apply(A.movedim(in_dims[0], 0)), 0


def _inverse_gaps(values: Tensor) -> Tensor:
    """F (..., d, d), as in `Spectrum`."""
    gap, info = values[..., None, :] - values[..., :, None], torch.finfo(values.dtype)
    rounding = values.shape[-1] * info.eps * values.detach().abs().amax(-1).clamp(min=info.tiny)
    apart = gap.detach().abs() > rounding.clamp(min=info.tiny)[..., None, None]
    return torch.where(apart, 1 / torch.where(apart, gap, 1.0), 0.0)


def _verified(A: Tensor, values: Tensor, Q: Tensor, solved: Tensor) -> tuple[Tensor, ...]:
    """The same, with the identity's spectrum in place of results that fail the check."""
    with full_precision():
        right = is_decomposition(A, values, Q)
    if right.device.type == "cpu" and all_true(right):
        return values, Q, solved
    choose = chooser(right)
    Q = choose(Q.mT, identity_like(A)).mT  # column by column, as before
    return choose(values, 1.0), Q, solved & right


def _bordered(A: Tensor) -> Tensor:
    """[[A, 0], [0, s]] with s above A's eigenvalues (..., d + 1, d + 1).

    Its decomposition is A's, plus s with the last unit vector. Nothing mixes the two, since LAPACK
    splits a matrix at a zero between them.
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
        saved(ctx, kept, values, Q, keep)

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> tuple[Tensor | None, ...]:
        return _InversePower.derivative(ctx, dX), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *_: Tensor | None) -> Tensor:
        return _InversePower.derivative(ctx, dA)

    @staticmethod
    def derivative(ctx: Any, change: Tensor) -> Tensor:
        """Derivative of X in the direction of a change of A, or the reverse: it is self-adjoint."""
        kept, values, Q, keep = ctx.saved_tensors
        keep = torch.ones_like(kept, dtype=torch.bool) if keep is None else keep
        differences = _divided_differences(kept, values, keep, ctx.exponent)
        with full_precision():
            found = Q @ (differences * (Q.mT @ symmetrize(change) @ Q)) @ Q.mT
        # `values` ties the gradient to the matrix where it is taken.
        guarded: Tensor = _FirstOrder.apply(symmetrize(found), values)
        return guarded


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
    slope = kept.pow(-exponent) / kept  # decreases with λ: the larger of two is λ_s's
    both_kept = torch.maximum(slope[..., :, None], slope[..., None, :]) * ratio

    f = torch.where(keep, kept.pow(-exponent), 0.0)
    gap = values[..., :, None] - values[..., None, :]
    one_kept = keep[..., :, None] ^ keep[..., None, :]
    across = (f[..., :, None] - f[..., None, :]) / torch.where(one_kept & (gap != 0), gap, 1.0)
    return torch.where(one_kept, across, torch.where(keep[..., :, None], both_kept, 0.0))


class _FirstOrder(Function):
    """The identity on a gradient; differentiating it again is an error.

    The gradient's inputs are saved as constants, so second derivatives would silently lack terms.
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
        raise NotImplementedError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> Tensor:
        raise NotImplementedError(_SECOND)


_SECOND = (
    "roots by eigendecomposition have first derivatives only; "
    "use newton_schulz() or coupled_newton() for second derivatives"
)
