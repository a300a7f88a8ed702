"""Eigenvalue-corrected Shampoo as a chain."""

from __future__ import annotations

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.masks import Mask
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Basis, by_rank
from funshampoo.operators.exponents import chosen_sides
from funshampoo.recipes.in_blocks import Distribute, in_blocks
from funshampoo.recipes.shampoo import Vectors
from funshampoo.transforms import ema, in_eigenbasis, kronecker_statistics, scale_by_adam


def eigenvalue_shampoo(
    learning_rate: Hyper | Schedule = 1e-3,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.99,
    epsilon: Hyper = 1e-8,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    every: int = 10,
    start: int = 1,
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
    """Eigenvalue-corrected Shampoo: its eigenvalues are second moments in the eigenbases.

        L_i ← beta2 L_i + (1-beta2) mat_i(G) mat_i(G)ᵀ             kronecker_statistics
        on a refresh, first:   Q_i ← the eigenvectors of L_i       in_eigenbasis
        V ← beta2 V + (1-beta2) R²,   R = G ×_1 Q_1ᵀ … ×_k Q_kᵀ    scale_by_adam(beta1=0)
        D = (M̂ ×_1 Q_1ᵀ … ×_k Q_kᵀ) / (√V̂ + epsilon)               M̂ the average of ema(beta1)
        W ← W - learning_rate (D ×_1 Q_1 … ×_k Q_k + weight_decay W)

    Like SOAP, with three differences: momentum lives outside the bases; the bases are renewed
    before they are used; and by eigendecompositions, where V follows by rank. It needs no grafting:
    V is updated on every step, however old the bases are. The betas are those of `shampoo`.

    State and a step's products are SOAP's, plus one more pair for M̂; a refresh takes 1.2 to 2.7
    times a QR's time for sides of 512 to 64 on a CPU thread, and far more than QR by products on a
    GPU (docs/gpu.md; `linalg.qr()` is an option).

    Use it like `soap`, if the first step should be taken at once, or as a Shampoo whose step length
    needs no other method.

    Args:
        learning_rate: number, tensor, or schedule of the old step count. Its scale is AdamW's.
        beta1: see `ema`.
        nesterov: whether M̂ looks ahead, as in `ema`; not in the papers.
        beta2, epsilon: of V, and beta2 of the factor matrices.
        weight_decay, mask: decoupled, see `add_decayed_weights`.
        every, start, basis, stagger: when and how the bases are renewed; see `in_eigenbasis`. By
            default with `linalg.by_rank()`. Before step `start` the step is Adam's.
        max_size, merge: blocks; see `blocked`.
        vectors: "diagonal": a block with one side or none takes Adam's own step. "blocks": in the
            eigenbasis of a d×d matrix.
        max_failures, spike_factor, distribute, tile: as in `shampoo`.

    Raises:
        ValueError, TypeError: an argument out of range.

    Reference: George et al., arXiv 1806.03884; Eschenhagen et al., arXiv 2506.03595.

    >>> import torch
    >>> tx = eigenvalue_shampoo(0.1, epsilon=1.0)
    >>> params = {"w": torch.zeros(2, 2)}
    >>> tx.update({"w": torch.diag(torch.tensor([3.0, -2.0]))}, tx.init(params), params)[0]["w"]
    tensor([[-0.0750, -0.0000],
            [-0.0000,  0.0667]])
    """
    stages = [
        kronecker_statistics(beta2, sides=chosen_sides(vectors)),
        ema(beta1, nesterov=nesterov),
        in_eigenbasis(
            scale_by_adam(0.0, beta2, epsilon),
            every,
            start=start,
            basis=by_rank() if basis is None else basis,
            stagger=stagger,
            first="identity",
            renew_before_use=True,
        ),
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
