"""SOAP-Muon as a chain."""

from __future__ import annotations

from funshampoo.blocks.layout import Merge
from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Basis
from funshampoo.recipes.in_blocks import Distribute
from funshampoo.recipes.routing import routed
from funshampoo.transforms import (
    AgreementGate,
    blend_towards,
    ema,
    hyperball,
    in_eigenbasis,
    kronecker_statistics,
    orthogonalize,
    radial_brake,
    scale_by_second_moment,
    update_floor,
)


def soap_muon(
    learning_rate: Hyper | Schedule = 0.0375,
    *,
    momentum: Hyper = 0.95,
    beta2: Hyper = 0.9,
    exponent: float = 0.5,
    gate: float | AgreementGate = 1.0,
    outward: Hyper = 0.5,
    inward: Hyper = 1.0,
    min_ratio: Hyper = 0.3825,
    every: int = 1,
    basis: Basis | None = None,
    matrices: Mask | None = None,
    others: GradientTransformation | None = None,
    merge: Merge = "none",
    max_failures: int | None = 20,
    distribute: Distribute | None = None,
) -> GradientTransformation:
    """SOAP-Muon: momentum, whitened as in SOAP, then orthogonalized as in Muon.

        B ← momentum B + (1 - momentum) G,   U = (1 - momentum) G + momentum B
        R = Q_1ᵀ U Q_2,   V ← beta2 V + (1 - beta2) R²,   U ← Q_1 (R / V^exponent) Q_2ᵀ
        O = √max(1, r/c) polar(U), its part along W times `outward` or `inward`
        O ← O max(1, min_ratio ‖W‖/‖O‖),   W ← W - learning_rate O, put to its first-order length
        on a refresh:   Q_i ← qr(L_i Q_i),   L_i ← beta2 L_i + (1 - beta2) mat_i(G) mat_i(G)ᵀ

    A matrix's first step is Muon's, since it has no bases yet. There is no weight decay: min_ratio
    makes steps relative to the weights, and the brake limits their growth. Defaults are those of
    the modded-nanogpt record, track 3, which decays the rate to 0 and warms up the momentum.

    State, for a matrix r×c: AdamW's two numbers per weight and 2 r² + 2 c². A step beside Muon's:
    the products of `soap`, and one QR per side every `every` steps; every=10 costs little.

    Use it like `muon`, for hidden matrices where steps are expensive: in the record it takes the
    fewest of all, with embeddings, head and vectors trained by Adam.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        momentum: see `ema`.
        beta2: decay of V and of the factor matrices.
        exponent: of V; 1/2 whitens fully.
        gate: how far to go from U towards the whitened U; see `blend_towards`.
        outward, inward: see `radial_brake`.
        min_ratio: see `update_floor`.
        every, basis: when and how the bases are renewed; see `in_eigenbasis`. As published, on
            step 1 and then on steps every + 1, 2 every + 1, ...
        matrices, others: the leaves it is for, by default all with two sides or more; and what the
            rest gets, by default `adamw(learning_rate)`.
        merge: `blocks.Stacked(...)` if a leaf is a stack of matrices, or several in one; see
            `blocked`. "none": each leaf is one matrix.
        max_failures, distribute: as in `shampoo`; the unit that a rank owns is a whole matrix.

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: KellerJordan/modded-nanogpt, records/track_3_optimization, 2026-06-09.

    >>> import torch
    >>> tx = soap_muon(0.1)
    >>> params = {"w": torch.eye(2), "b": torch.zeros(2)}
    >>> grads = {"w": torch.tensor([[0.0, 3.0], [-4.0, 0.0]]), "b": torch.ones(2)}
    >>> tx.update(grads, tx.init(params), params)[0]["w"].round(decimals=3)
    tensor([[-0.0050, -0.1000],
            [ 0.1000, -0.0050]])
    """
    check_range("momentum", momentum, 0.0, 1.0, high_open=True)
    whitened = scale_by_second_moment(
        beta2, 1e-16, exponent=exponent, damping="floor", bias_correction=False
    )
    direction = chain(
        kronecker_statistics(beta2, bias_correction=False),
        ema(momentum, nesterov=True, bias_correction=False),
        blend_towards(in_eigenbasis(whitened, every, offset=1, basis=basis), gate),
        orthogonalize("converging", 12, norm="schatten4"),
        radial_brake(outward, inward),
        update_floor(min_ratio),
        hyperball(learning_rate, relative=False, radius="first_order"),
    )
    return routed(direction, learning_rate, matrices, others, max_failures, distribute, merge)
