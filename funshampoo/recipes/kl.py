"""KL-Shampoo and KL-SOAP as chains."""

from __future__ import annotations

from typing import Any

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_count, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Basis
from funshampoo.operators.exponents import chosen_sides
from funshampoo.operators.kl import clamped_at
from funshampoo.recipes.in_blocks import Distribute, in_blocks
from funshampoo.recipes.shampoo import Vectors
from funshampoo.transforms import (
    ema,
    in_eigenbasis,
    kl_statistics,
    scale_by_eigenvalues,
    scale_by_rms,
)


def kl_shampoo(
    learning_rate: Hyper | Schedule = 1e-4,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.98,
    epsilon: Hyper = 1e-8,
    nesterov: bool = False,
    damping: Hyper = 0.0,
    initial_eigenvalue: float = 0.1,
    clamp: int | None = 4000,
    weight_decay: Hyper = 1e-2,
    mask: Mask | None = None,
    every: int = 10,
    basis: Basis | None = None,
    stagger: bool = False,
    max_size: int | None = 1024,
    merge: Merge = "small",
    vectors: Vectors = "diagonal",
    max_failures: int | None = 20,
    spike_factor: Hyper | None = None,
    distribute: Distribute | None = None,
    tile: TileSize = "auto",
) -> GradientTransformation:
    """KL-Shampoo: Shampoo's exponent 1/2, with statistics of which it is the best estimate.

        L_i ← β2 L_i + (1-β2) (d_i/n) mat_i(G_i) mat_i(G_i)ᵀ,   G_i = G ×_j S_j^(-1/2)
        λ_i ← β2 λ_i + (1-β2) the same in the bases, every step          kl_statistics
        M ← β1 M + (1-β1) G,   R = M ×_1 Q_1ᵀ … ×_k Q_kᵀ                  in_eigenbasis(ema, ...)
        W ← W - learning_rate ((R / (√(λ_1⊗…⊗λ_k) + epsilon)) ×_1 Q_1 … ×_k Q_k + weight_decay W)
        on a refresh:   Q_i ← qr(L_i Q_i)

    with S_j = Q_j diag(λ_j) Q_jᵀ of the other sides. Nothing is grafted: the eigenvalues give the
    step its length, and adapt on every step between two refreshes. A block's first gradient only
    initializes its bases, as published; decay alone moves it. The published defaults, except
    blocks.

    State beside AdamW's two numbers per weight, for a block m×n: one number per weight less, and 2
    (m² + n²) + m + n more. A step beside it: nine products of m² n or m n² multiplications, where
    `soap` has six, and at refreshes one QR per side.

    Use it in place of Shampoo or SOAP, without Adam's second moment; its paper found it as good or
    better in pretraining. Eigenvalues start at 0.1 and need some 1/(1-β2) steps to decay to those
    of small gradients; until then steps are short. `clamp` keeps 1/√λ below the length of a side,
    or 10: if gradient entries are smaller than that allows, about 1/√(mn), steps get shorter with
    them. If gradients grow suddenly, the first step is too long, as its eigenvalues are older, and
    later steps are too short, as the eigenvalues of both sides absorb all of the growth: at 10
    times, 4.3 times as long, and no shorter than 0.9; at 10,000 times, 4,400, and 1/360, which
    takes 240 steps to become a half. `spike_factor` holds the first ones; `kl_soap` adapts at once.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1: of the momentum.
        beta2: of L_i and λ_i.
        epsilon: added to the root of the eigenvalues.
        nesterov: whether M looks ahead, as in `ema`; not in the paper.
        damping: share of the other sides' 1/λ that is added to λ_i; see `kl_statistics`.
        initial_eigenvalue: of all λ_i.
        clamp: λ_i ≥ 1 / max(10, min(d_i, clamp))²; None: no floor.
        weight_decay, mask: decoupled, see `add_decayed_weights`.
        every, basis, stagger: when and how the bases are renewed; see `in_eigenbasis`. As
            published, on step 1 and then on steps every + 1, 2 every + 1, ...
        max_size, merge: blocks; see `blocked`.
        vectors: "diagonal": a block with one side or none has the eigenvalues of its coordinates,
            unrotated: RMSprop's step, with momentum, by the averages from before this gradient.
            "blocks": a d×d matrix.
        max_failures, spike_factor, distribute, tile: as in `shampoo`.

    Raises:
        ValueError, TypeError: an argument out of range.

    Reference: Lin et al., arXiv 2509.03378.

    >>> import torch
    >>> tx = kl_shampoo(1.0, beta1=0.0, weight_decay=0.0, initial_eigenvalue=4.0)
    >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
    >>> state = tx.update(w, tx.init(w), w)[1]
    >>> tx.update(w, state, w)[0]["w"].round(decimals=3)  # √(4 · 4)
    tensor([[-0.5000, -0.0000],
            [-0.0000, -0.2500]])
    """
    direction = chain(_momentum(beta1, nesterov), scale_by_eigenvalues(epsilon))
    stages = [
        _statistics(beta2, damping, initial_eigenvalue, clamp, vectors),
        in_eigenbasis(direction, every, offset=1, basis=basis, stagger=stagger),
    ]
    return in_blocks(
        stages,
        learning_rate=learning_rate,
        every=every,
        max_size=max_size,
        merge=merge,
        weight_decay=weight_decay,
        mask=mask,
        max_failures=max_failures,
        spike_factor=spike_factor,
        distribute=distribute,
        tile=tile,
    )


def kl_soap(
    learning_rate: Hyper | Schedule = 1e-4,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.98,
    statistics_beta: Hyper | None = None,
    epsilon: Hyper = 1e-8,
    nesterov: bool = False,
    damping: Hyper = 0.0,
    initial_eigenvalue: float = 0.1,
    clamp: int | None = 4000,
    weight_decay: Hyper = 1e-2,
    mask: Mask | None = None,
    every: int = 10,
    basis: Basis | None = None,
    stagger: bool = False,
    max_size: int | None = 1024,
    merge: Merge = "small",
    vectors: Vectors = "diagonal",
    max_failures: int | None = 20,
    spike_factor: Hyper | None = None,
    distribute: Distribute | None = None,
    tile: TileSize = "auto",
) -> GradientTransformation:
    """KL-SOAP: SOAP in the eigenbases of KL-Shampoo's statistics.

        L_i, λ_i as in `kl_shampoo`                                      kl_statistics
        R = G ×_1 Q_1ᵀ … ×_k Q_kᵀ                                        in_eigenbasis
        M ← β1 M + (1-β1) R,   V ← β2 V + (1-β2) R²                      ema, scale_by_rms
        W ← W - learning_rate ((M / (√V + epsilon)) ×_1 Q_1 … ×_k Q_k + weight_decay W)
        on a refresh:   Q_i ← qr(L_i Q_i)

    M and V are not bias-corrected, as published, and a block's first gradient does not move it;
    decay alone does. The published defaults, except blocks.

    State beside AdamW's two numbers per weight, for a block m×n: 2 (m² + n²) + m + n. A step beside
    it: nine products of m² n or m n² multiplications, where `soap` has six, and at refreshes one QR
    per side.

    Use it instead of `soap`, at its learning rate: the step is also Adam's, in bases from another
    estimate of the same covariance, and does not depend on the scale of gradients as that of
    `kl_shampoo` may.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1, beta2, epsilon: of Adam.
        nesterov: whether M looks ahead, as in `ema`; not in the paper.
        statistics_beta: of L_i and λ_i; beta2 by default.
        damping, initial_eigenvalue, clamp: as in `kl_shampoo`.
        weight_decay, mask: decoupled, see `add_decayed_weights`.
        every, basis, stagger: when and how the bases are renewed; see `in_eigenbasis`. As
            published, on step 1 and then on steps every + 1, 2 every + 1, ...
        max_size, merge: blocks; see `blocked`.
        vectors: "diagonal": a block with one side or none takes Adam's own step. "blocks": in the
            eigenbasis of a d×d matrix.
        max_failures, spike_factor, distribute, tile: as in `shampoo`.

    Raises:
        ValueError, TypeError: an argument out of range.

    Reference: Lin et al., arXiv 2509.03378.

    >>> import torch
    >>> tx = kl_soap(0.1, beta1=0.0, beta2=0.5, weight_decay=0.0)
    >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
    >>> state = tx.update(w, tx.init(w), w)[1]
    >>> tx.update(w, state, w)[0]["w"].diag()  # the sign, over √(1 - β2)
    tensor([-0.1414, -0.1414])
    """
    if statistics_beta is not None:
        check_range("statistics_beta", statistics_beta, 0.0, 1.0, high_open=True)
    beta = beta2 if statistics_beta is None else statistics_beta
    adam = chain(_momentum(beta1, nesterov), scale_by_rms(beta2, epsilon))
    stages = [
        _statistics(beta, damping, initial_eigenvalue, clamp, vectors),
        in_eigenbasis(adam, every, offset=1, basis=basis, stagger=stagger),
    ]
    return in_blocks(
        stages,
        learning_rate=learning_rate,
        every=every,
        max_size=max_size,
        merge=merge,
        weight_decay=weight_decay,
        mask=mask,
        max_failures=max_failures,
        spike_factor=spike_factor,
        distribute=distribute,
        tile=tile,
    )


def _momentum(beta1: Hyper, nesterov: bool) -> GradientTransformation:
    return ema(beta1, nesterov=nesterov, bias_correction=False)


def _statistics(
    beta: Hyper, damping: Hyper, initial: float, clamp: int | None, vectors: Vectors
) -> GradientTransformation:
    if clamp is not None:
        check_count("clamp", clamp)

    least: Any = 0.0 if clamp is None else clamped_at(clamp)
    return kl_statistics(
        beta,
        damping=damping,
        initial_eigenvalue=initial,
        least_eigenvalue=least,
        sides=chosen_sides(vectors),
    )
