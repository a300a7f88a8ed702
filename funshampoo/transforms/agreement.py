"""A gate that decides how far to follow another direction, by how well it agrees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import Hyper, Schedule
from funshampoo.linalg.products import power as raised
from funshampoo.operators.leaf_ops import filled
from funshampoo.operators.matrices import inner_product, norm_over, safe


@dataclass(frozen=True)
class AgreementGate:
    """How far to follow a direction W instead of U, by how well it agrees with U and the gradient.

        a = (cos(W, U) - agreement) / (1 - agreement)
        b = (cos(W, G) - alignment) / (cos(U, G) - alignment)
        γ = (a b)^power,   a and b in [0, 1], γ in [floor, cap]

    Attributes:
        agreement: γ > 0 from this cosine with U on; below 1; below -1, γ is always above 0.
        alignment: the same for the cosine with the gradient.
        power: above 0.
        floor, cap: numbers, or schedules of the old step count, in [0, 1].

    Raises:
        ValueError: a number out of range, or a floor above the cap.

    Reference: the SOAP-Muon record, KellerJordan/modded-nanogpt, track 3 (2026).
    """

    agreement: float = 0.2
    alignment: float = 0.0
    power: float = 1.0
    floor: Hyper | Schedule = 0.0
    cap: Hyper | Schedule = 1.0

    def __post_init__(self) -> None:
        for name, least in (("agreement", self.agreement), ("alignment", self.alignment)):
            check_range(name, least, float("-inf"), 1.0, low_open=True, high_open=True)
        check_range("power", self.power, 0.0, low_open=True)
        check_range("floor", self.floor, 0.0, 1.0, schedule=True)
        check_range("cap", self.cap, 0.0, 1.0, schedule=True)
        numbers = [x for x in (self.floor, self.cap) if isinstance(x, (int, float))]
        if numbers != sorted(numbers):
            raise ValueError(f"floor is {self.floor}, above cap, {self.cap}: the gate is between.")

    def __call__(
        self, W: Tensor, U: Tensor, G: Tensor, block_ndim: int, count: Tensor | None
    ) -> Tensor:
        """γ of every block, (N, 1, ...), for directions (N, ...) at this old step count."""
        agrees = (_cosine(W, U, block_ndim) - self.agreement) / (1 - self.agreement)
        own = (_cosine(U, G, block_ndim) - self.alignment).clamp(min=1e-8)
        aligned = (_cosine(W, G, block_ndim) - self.alignment) / own
        share = agrees.clamp(0, 1) * aligned.clamp(0, 1)
        if self.power != 1:
            share = raised(share, self.power)
        least, most = [_at(x, count, share) for x in (self.floor, self.cap)]
        return torch.minimum(torch.maximum(share, least), most)


def _cosine(x: Tensor, y: Tensor, block_ndim: int) -> Tensor:
    x, y = (z / safe(norm_over(z, block_ndim)) for z in (x, y))
    return inner_product(x, y, block_ndim)


def _at(value: Hyper | Schedule, count: Tensor | None, like: Tensor) -> Tensor:
    if callable(value):
        assert count is not None, "a stage that declares the clock was not given it"
        value = value(count)
    return filled(like, value)
