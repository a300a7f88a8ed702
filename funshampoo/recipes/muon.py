"""Methods that step along the orthogonal factor of a matrix."""

from __future__ import annotations

import torch

from funshampoo.blocks.layout import Merge
from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg.polynomials import Polynomials
from funshampoo.operators.shape_scale import Scale
from funshampoo.recipes.in_blocks import Distribute
from funshampoo.recipes.routing import decay, routed
from funshampoo.transforms import (
    add_cautious_decay,
    ema,
    normalize_rows,
    orthogonalize,
    scale_by_learning_rate,
    trace,
)


def muon(
    learning_rate: Hyper | Schedule = 1e-3,
    *,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    weight_decay: Hyper = 0.1,
    polynomials: Polynomials = "newton_schulz",
    steps: int | None = None,
    scale: Scale = "muon",
    epsilon: float = 1e-7,
    dtype: torch.dtype | None = None,
    matrices: Mask | None = None,
    others: GradientTransformation | None = None,
    merge: Merge = "none",
    max_failures: int | None = 20,
    distribute: Distribute | None = None,
) -> GradientTransformation:
    """Muon: momentum, orthogonalized.

        B ← momentum B + (1 - momentum) G,   U = (1 - momentum) G + momentum B   if nesterov
        W ← W - learning_rate (s polar(U) + weight_decay W)

    Defaults are those of torch.optim.Muon, which it matches except for rounding: it multiplies in
    float32, while torch uses bfloat16, as this does with dtype=torch.bfloat16.

    State: one number per entry, half of AdamW's. Time: five steps of three products each, 30 r² c
    operations for an r×c matrix, r ≤ c: negligible if the batch is large relative to r, and no
    eigendecompositions. Use it for hidden matrices, where its step is equally long in every
    direction; AdamW is better for embeddings, head and vectors. scale="adam" makes a step as long
    as AdamW's, so that one learning rate suits both.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        momentum, nesterov: see `ema`.
        weight_decay: λ ≥ 0, decoupled.
        polynomials, steps, scale, epsilon, dtype: see `orthogonalize`.
        matrices, others: the leaves it is for, by default all with two sides or more; and what the
            rest gets, by default `adamw(learning_rate)`.
        merge: `blocks.Stacked(...)` if a leaf is a stack of matrices, like experts, or several in
            one, like query, key and value; see `blocked`. "none": each leaf is one matrix.
        max_failures, distribute: as in `shampoo`; a rank owns whole matrices, and whole leaves of
            the default `others` (of given `others`, if they are `sharded` themselves).

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.

    >>> import torch
    >>> tx = muon(0.1, weight_decay=0.0, polynomials="polar_express_8")
    >>> params = {"w": torch.eye(2), "b": torch.zeros(2)}
    >>> grads = {"w": torch.diag(torch.tensor([3.0, -4.0])), "b": torch.ones(2)}
    >>> tx.update(grads, tx.init(params), params)[0]["w"].round(decimals=3)
    tensor([[-0.1000, -0.0000],
            [-0.0000,  0.1000]])
    """
    check_range("momentum", momentum, 0.0, 1.0, high_open=True)
    direction = chain(
        ema(momentum, nesterov=nesterov, bias_correction=False),
        orthogonalize(polynomials, steps, scale=scale, epsilon=epsilon, dtype=dtype),
        *decay(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
    return routed(direction, learning_rate, matrices, others, max_failures, distribute, merge)


def normuon(
    learning_rate: Hyper | Schedule = 1e-2,
    *,
    momentum: Hyper = 0.95,
    beta2: Hyper = 0.95,
    nesterov: bool = False,
    weight_decay: Hyper = 1e-2,
    cautious_decay: bool = False,
    scale: Scale = "unit_rms",
    epsilon: float = 1e-8,
    dtype: torch.dtype | None = None,
    matrices: Mask | None = None,
    others: GradientTransformation | None = None,
    merge: Merge = "none",
    max_failures: int | None = 20,
    distribute: Distribute | None = None,
) -> GradientTransformation:
    """NorMuon: Muon's direction, with rows of equal length over time.

        B ← momentum B + G,   U = G + momentum B   if nesterov, else B
        O = polar(U),   v_i ← beta2 v_i + (1 - beta2) mean_j(O_ij²),   N_ij = O_ij / √v_i
        W ← W - learning_rate (s N ‖O‖/‖N‖ + weight_decay W)

    Defaults are those of microsoft/dion.

    State: Muon's, plus one number per row. Time: Muon's, plus two passes. Use it like Muon; if some
    neurons get much longer updates than others, it evens them out.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        momentum, nesterov: see `trace`.
        beta2: see `normalize_rows`.
        weight_decay: λ ≥ 0, decoupled.
        cautious_decay: only where a step shrinks the weight anyway; see `add_cautious_decay`.
        scale, epsilon, dtype: see `orthogonalize`.
        matrices, others: the leaves it is for, by default all with two sides or more; and what the
            rest gets, by default `adamw(learning_rate)`.
        merge: `blocks.Stacked(...)` if a leaf is a stack of matrices, like experts, or several
            in one, like query, key and value; see `blocked`. "none": each leaf is one matrix.
        max_failures, distribute: as in `shampoo`; a rank owns whole matrices, and whole leaves of
            the default `others` (of given `others`, if they are `sharded` themselves).

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: Li et al., arXiv 2510.05491.

    >>> import torch
    >>> tx = normuon(0.1)
    >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    >>> grads = {"w": torch.tensor([[1.0, 1.0], [2.0, 2.0]]), "b": torch.ones(2)}
    >>> tx.update(grads, tx.init(params), params)[0]["w"].round(decimals=2)
    tensor([[-0.0500, -0.0500],
            [-0.0500, -0.0500]])
    """
    check_flags(cautious_decay=cautious_decay)
    decays = [add_cautious_decay(weight_decay)] if cautious_decay else decay(weight_decay)
    direction = chain(
        trace(momentum, nesterov=nesterov),
        orthogonalize(
            "polar_express", scale=None, epsilon=epsilon, norm="added", slack=1.02, dtype=dtype
        ),
        normalize_rows(beta2, scale=scale),
        *decays,
        scale_by_learning_rate(learning_rate),
    )
    return routed(direction, learning_rate, matrices, others, max_failures, distribute, merge)


def spectral_descent(
    learning_rate: Hyper | Schedule = 1e-2,
    *,
    beta1: Hyper = 0.9,
    weight_decay: Hyper = 0.0,
    polynomials: Polynomials = "newton_schulz",
    steps: int | None = None,
    scale: Scale = None,
    epsilon: float = 1e-7,
    dtype: torch.dtype | None = None,
    matrices: Mask | None = None,
    others: GradientTransformation | None = None,
    merge: Merge = "none",
    max_failures: int | None = 20,
    distribute: Distribute | None = None,
) -> GradientTransformation:
    """Spectral descent: the steepest direction if a step is measured by its largest singular value.

        M ← beta1 M + (1 - beta1) G,   W ← W - learning_rate (s polar(M) + weight_decay W)

    Shampoo's direction without memory: (G Gᵀ)^(-1/4) G (Gᵀ G)^(-1/4) = polar(G). Defaults are those
    of SpectralDescentPreconditionerConfig of facebookresearch/optimizers.

    State and time are Muon's, which differs in its momentum and in s. Use it to see what Muon's own
    choices contribute.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1: see `ema`.
        weight_decay: λ ≥ 0, decoupled.
        polynomials, steps, scale, epsilon, dtype: see `orthogonalize`.
        matrices, others: the leaves it is for, by default all with two sides or more; and what the
            rest gets, by default `adamw(learning_rate)`.
        merge: `blocks.Stacked(...)` if a leaf is a stack of matrices, like experts, or several in
            one, like query, key and value; see `blocked`. "none": each leaf is one matrix.
        max_failures, distribute: as in `shampoo`; a rank owns whole matrices, and whole leaves of
            the default `others` (of given `others`, if they are `sharded` themselves).

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: Carlson et al., AISTATS 2015; Bernstein and Newhouse, arXiv 2409.20325.

    >>> import torch
    >>> tx = spectral_descent(0.1, polynomials="polar_express_8")
    >>> params = {"w": torch.zeros(2, 2)}
    >>> grads = {"w": torch.diag(torch.tensor([3.0, -4.0]))}
    >>> tx.update(grads, tx.init(params), params)[0]["w"].round(decimals=3)
    tensor([[-0.1000, -0.0000],
            [-0.0000,  0.1000]])
    """
    direction = chain(
        ema(beta1),
        orthogonalize(polynomials, steps, scale=scale, epsilon=epsilon, dtype=dtype),
        *decay(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
    return routed(direction, learning_rate, matrices, others, max_failures, distribute, merge)
