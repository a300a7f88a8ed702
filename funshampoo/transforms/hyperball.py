"""Steps on the sphere of the weights' norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from funshampoo.core.checks import check_choice, check_flag, check_rate
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.traits import DIRECTED, FLIPS
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.leafwise import leafwise_at_rate
from funshampoo.operators.matrices import inner_product, norm_over, safe


def hyperball(
    learning_rate: Hyper | Schedule,
    *,
    relative: bool = True,
    radius: Literal["kept", "first_order"] = "kept",
) -> GradientTransformation:
    """Norm-controlled step: U ← W' - W, where W' is a step along -U, rescaled to length ρ.

        S = learning_rate ‖W‖ U / ‖U‖   if relative, else   learning_rate U
        W' = (W - S) ρ / ‖W - S‖,   ρ = ‖W‖ or ‖W‖ - ⟨S, W⟩ / ‖W‖

    Put it at the end of a chain instead of `scale_by_learning_rate`, without weight decay: it sets
    the norm of each leaf (in `blocked`, block). A weight of zero stays zero if relative; else it
    moves by a plain step.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        relative: the learning rate is the length of a step on a sphere of radius 1.
        radius: "kept": ρ = ‖W‖; "first_order": the step's length change to first order, without
            what a long tangential step adds.

    State: `LearningRateState`.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: KL-SOAP-H and SOAP-Muon, KellerJordan/modded-nanogpt, track 3 (2026).

    >>> import torch
    >>> tx = hyperball(0.75)
    >>> w = {"w": torch.tensor([2.0, 0.0])}
    >>> tx.update({"w": torch.tensor([0.0, -5.0])}, tx.init(w), w)[0]
    {'w': tensor([-0.4000,  1.2000])}
    """
    check_rate(learning_rate)
    check_flag("relative", relative)
    check_choice("radius", radius, ("kept", "first_order"))

    def moved(u: Tensor, w: Tensor, rate: Hyper, block_ndim: int) -> Tensor:
        size = norm_over(w, block_ndim)
        if relative:  # divide first: the quotient of the two lengths may overflow
            u = u / safe(norm_over(u, block_ndim)) * size
        step = multiply(u, rate, donate=False)
        new, wanted = w - step, size
        if radius == "first_order":
            wanted = size - inner_product(step, w, block_ndim) / safe(size)
        factor = wanted / safe(norm_over(new, block_ndim))
        return torch.where(size == 0, -step, new * factor - w)

    return leafwise_at_rate(moved, learning_rate, elementwise=False, traits=(DIRECTED, FLIPS))
