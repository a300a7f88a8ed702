"""SOAP as a chain."""

from __future__ import annotations

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Basis
from funshampoo.operators.exponents import Sides, chosen_sides
from funshampoo.recipes.in_blocks import Distribute, in_blocks
from funshampoo.recipes.shampoo import Vectors
from funshampoo.transforms import in_eigenbasis, kronecker_statistics, scale_by_adam


def soap(
    learning_rate: Hyper | Schedule = 3e-3,
    *,
    beta1: Hyper = 0.95,
    beta2: Hyper = 0.95,
    statistics_beta: Hyper | None = None,
    epsilon: Hyper = 1e-8,
    nesterov: bool = False,
    weight_decay: Hyper = 1e-2,
    mask: Mask | None = None,
    every: int = 10,
    basis: Basis | None = None,
    stagger: bool = False,
    max_size: int | None = 1024,
    merge: Merge = "small",
    vectors: Vectors = "diagonal",
    sides: Sides | None = None,
    max_failures: int | None = 20,
    spike_factor: Hyper | None = None,
    distribute: Distribute | None = None,
    tile: TileSize = "auto",
) -> GradientTransformation:
    """SOAP: Adam in the eigenbases of Shampoo's factor matrices.

        L_i ← βs L_i + (1-βs) mat_i(G) mat_i(G)ᵀ                   kronecker_statistics
        R = G ×_1 Q_1ᵀ … ×_k Q_kᵀ,   D = Adam(R)                   in_eigenbasis(scale_by_adam)
        W ← W - learning_rate (D ×_1 Q_1 … ×_k Q_k + weight_decay W)
        on a refresh:   Q_i ← qr(L_i Q_i)

    A block's first gradient only initializes its bases, as published; decay alone moves it.
    Published defaults, except blocks: there, sides above 10,000 are left alone, no matrix is cut.

    State beside AdamW's two numbers per weight, for a block m×n: 2 m² + 2 n². A step beside it: m²
    n + m n² multiplications into the bases, as many back and as many for the statistics, and at
    refreshes one QR per side.

    Use it where layers are matrices with moderate sides and a step of AdamW takes much less time
    than its gradient: it trades time for fewer steps, as its paper shows for language models. Its
    step is Adam's in other coordinates, so start from the rate that works for AdamW.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1, beta2, epsilon: of Adam.
        statistics_beta: βs; beta2 by default.
        nesterov: whether Adam's first moment looks ahead, as in `scale_by_adam`. It did better on
            every task of docs/family.md; it is not in the paper.
        weight_decay, mask: decoupled, see `add_decayed_weights`.
        every, basis, stagger: when and how the bases are renewed; see `in_eigenbasis`. As
            published, on step 1 and then on steps every + 1, 2 every + 1, ...
        max_size, merge: blocks; see `blocked`.
        vectors: "diagonal": a block with one side or none takes Adam's own step. "blocks": in the
            eigenbasis of a d×d matrix.
        sides: which sides are rotated, all by default. "smaller": only the shortest of every block,
            the paper's one-sided variant; see `root_inverse`.
        max_failures, spike_factor, distribute, tile: as in `shampoo`.

    Raises:
        ValueError, TypeError: an argument out of range.

    Reference: Vyas et al., arXiv 2409.11321.

    >>> import torch
    >>> tx = soap(0.1, weight_decay=0.0)
    >>> params = {"w": torch.zeros(2, 2)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update({"w": torch.diag(torch.tensor([3.0, -2.0]))}, state, params)
    >>> updates["w"].abs() > 0.09  # the sign of both, whatever their size
    tensor([[ True, False],
            [False,  True]])
    """
    if statistics_beta is not None:
        check_range("statistics_beta", statistics_beta, 0.0, 1.0, low_open=True)
    sides = chosen_sides(vectors, sides)
    adam = scale_by_adam(beta1, beta2, epsilon, nesterov=nesterov)
    stages = [
        kronecker_statistics(beta2 if statistics_beta is None else statistics_beta, sides=sides),
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
