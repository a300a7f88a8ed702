"""The stack of a record as one chain: modded-nanogpt, track 3, of 2026.

Momentum whitened as in SOAP, as far as that agrees, and orthogonalized as in Muon; a brake on what
only lengthens the weights, a floor under the step, decay where it agrees; gradients taken ahead of
the weights, and an average to evaluate with. `python examples/train.py --task text --optimizers
record adamw` trains with it.
"""

from __future__ import annotations

from typing import Any

from funshampoo import (
    AgreementGate,
    GradientTransformation,
    adamw,
    add_cautious_decay,
    blend_towards,
    blocked,
    chain,
    ema,
    ema_nesterov,
    guarded,
    in_eigenbasis,
    kronecker_statistics,
    orthogonalize,
    partition,
    radial_brake,
    scale_by_learning_rate,
    scale_by_second_moment,
    tail_average,
    update_floor,
)


def record(
    learning_rate: Any, others: GradientTransformation | None = None, labels: Any = None
) -> GradientTransformation:
    """Hidden matrices in this way, embedding, readout and vectors by AdamW or `others`.

    `labels` says which are "hidden" and which "rest" in another model.
    """
    whitened = scale_by_second_moment(0.9, 1e-16, damping="floor", bias_correction=False)
    hidden = chain(
        kronecker_statistics(0.9),
        ema(0.95, nesterov=True, bias_correction=False),
        blend_towards(in_eigenbasis(whitened, every=5, offset=1), AgreementGate(floor=0.45)),
        orthogonalize("converging", steps=12, norm="schatten4"),
        radial_brake(outward=0.5),
        update_floor(0.38),
        add_cautious_decay(0.01),
        scale_by_learning_rate(learning_rate),
    )
    blocks = blocked(guarded(hidden), None, merge="matrix", with_params=True)
    others = others or adamw(learning_rate)
    steps = partition({"hidden": blocks, "rest": others}, labels or parts_of)
    return chain(steps, ema_nesterov(0.3, beta=0.9), tail_average(beta=0.9))


record.takes_live = True  # type: ignore[attr-defined]  # it hands the rate on as it is


def parts_of(params: dict[str, Any]) -> dict[str, str]:
    """Whose step is whose."""
    return {
        name: "hidden" if name.startswith("blocks.") and p.ndim == 2 else "rest"
        for name, p in params.items()
    }
