"""SPlus, by its constructor's arguments."""

from __future__ import annotations

from funshampoo.combinators.chaining import chain
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.recipes.routing import whole
from funshampoo.recipes.splus import signs_in_eigenbases


def splus(
    *,
    lr: Hyper | Schedule = 0.1,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    ema_rate: Hyper = 0.999,
    inverse_every: int = 100,
    eps: float = 1e-30,
    weight_decay: Hyper = 0.01,
    max_dim: int = 10_000,
    nonstandard_constant: float = 0.001,
) -> GradientTransformation:
    """SPlus of kvfrans/splus. eps, added to the factor matrices, changes no eigenvector.

    A side of max_dim itself is left alone there, by mistake, at a matrix's rate; `recipes.splus`
    keeps it.
    """

    def scale(shape: tuple[int, ...]) -> float:
        square = len(shape) == 2 and max(shape) <= max_dim
        return 2 / sum(shape) if square else nonstandard_constant

    stages = signs_in_eigenbases(
        lr,
        beta1=b1,
        beta2=b2,
        average=ema_rate,
        weight_decay=weight_decay,
        every=inverse_every,
        basis=None,
        is_kept=lambda d: d < max_dim,
        scale=scale,
    )
    return whole(chain(*stages), 20, None)
