"""Damping of the radial part of a step, along the weights."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.core.traits import DIRECTED
from funshampoo.core.tree import cast
from funshampoo.operators.leaf_ops import on_device
from funshampoo.operators.leafwise import leafwise
from funshampoo.operators.matrices import inner_product, safe


def radial_brake(outward: Hyper = 0.5, inward: Hyper = 1.0) -> GradientTransformation:
    """Scale the part of U along W, by one factor if the step lengthens W and another if not.

        γ = ⟨U, W⟩ / ⟨W, W⟩,   U ← U + ((outward if γ < 0 else inward) - 1) γ W

    A step goes along -U, so γ < 0 is outward. Put it before the learning rate. A weight of zero has
    no radius, and its update stays.

    Args:
        outward, inward: the factors, ≥ 0; 1 keeps that part, 0 removes it.

    Raises:
        ValueError: a negative number; from update, params missing.

    Reference: the SOAP-Muon record, KellerJordan/modded-nanogpt, track 3 (2026).

    >>> import torch
    >>> w, u = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([-1.0, 1.0])}
    >>> radial_brake().update(u, (), w)[0]
    {'w': tensor([-0.5000,  1.0000])}
    """
    check_range("outward", outward, 0.0)
    check_range("inward", inward, 0.0)

    def braked(u: Tensor, w: Tensor, out: Hyper, into: Hyper, block_ndim: int) -> Tensor:
        part = inner_product(u, w, block_ndim) / safe(inner_product(w, w, block_ndim))
        goes_out = cast(part < 0, u.dtype)
        factor = goes_out * on_device(out, u) + (1 - goes_out) * on_device(into, u)
        return u + cast((factor - 1) * part, u.dtype) * w

    return leafwise(braked, [outward, inward], needs_params=True, traits=(DIRECTED,))
