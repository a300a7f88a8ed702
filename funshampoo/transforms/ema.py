"""The gradient filter: an exponential moving average of the updates."""

from __future__ import annotations

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, identity, renamed
from funshampoo.core.live import NO_NUMBERS, Numbers, is_exactly, number
from funshampoo.operators import columns
from funshampoo.operators.columns import Column
from funshampoo.operators.weights import first_average, update_averages
from funshampoo.state.stages import EmaState


def ema(
    beta1: Hyper = 0.9,
    beta3: Hyper | None = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    own_steps: bool = True,
) -> GradientTransformation:
    """The gradient filter: an exponential moving average of the updates.

        M ← beta1 M + (1 - beta1) U,    U ← M / (1 - beta1^t)

    With beta3, the update looks ahead from the old M with a different decay (Lion, NAdam):

        U ← (beta3 M_old + (1 - beta3) U) / (1 - beta3 beta1^(t-1))

    With nesterov, the update is the average after one more U like this one, as in Muon; this equals
    beta3 = beta1² except for rounding:

        U ← (beta1 M + (1 - beta1) U) / (1 - beta1^(t+1))

    Args:
        beta1: decay, in [0, 1). The number 0 makes the stage the identity, without state, unless
            beta3 looks ahead from the last update.
        beta3: decay of the look-ahead, in [0, 1); None means beta1.
        nesterov: look ahead from the new M.
        bias_correction: divide by the total weight of the gradients in the average.
        own_steps: bias-correct by each block's own gradient count; False: by a common one.

    State: `EmaState`, float32 at least.

    Raises:
        ValueError: beta1 or beta3 out of range; beta3 and nesterov both given.
        TypeError: a flag that is not a bool.

    Reference: Kingma and Ba, arXiv 1412.6980; for beta3 Chen et al., arXiv 2302.06675.

    >>> import torch
    >>> tx = ema(0.9)
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([1.0, 2.0])}, tx.init(params))[0]
    {'w': tensor([1., 2.])}
    """
    check_range("beta1", beta1, 0.0, 1.0, high_open=True)
    check_flags(nesterov=nesterov, bias_correction=bias_correction, own_steps=own_steps)
    if beta3 is not None:
        check_range("beta3", beta3, 0.0, 1.0, high_open=True)
        if nesterov:
            raise ValueError("beta3 and nesterov both look ahead: give one of them.")
    if is_exactly(beta1, 0) and beta3 is None:
        return renamed(identity(), "ema")

    by_weight = bias_correction and own_steps

    def init(params: Tree, *, block_ndim: int = 0) -> EmaState:
        options = {"corrects": bias_correction, "own_steps": own_steps}
        return EmaState(*first_average(params, block_ndim, **options))

    def update(
        updates: Tree,
        state: EmaState,
        *,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, EmaState]:
        decay, ahead_decay = number(beta1, hyper), None if beta3 is None else number(beta3, hyper)

        def average(u: Column, *rest: Column) -> tuple[Column, Column, Column]:
            *fine, m, w = rest
            u = columns.cast_like(u, m)
            ahead = None
            if ahead_decay is not None:
                ahead = columns.average_of(m, w, u, ahead_decay, fine, False, by_weight=by_weight)
            m, w = columns.average_of(m, w, u, decay, fine, donate, by_weight=by_weight)
            if nesterov:
                next_weight = columns.add_weight(w, decay, fine, False) if bias_correction else w
                ahead = columns.lerp(u, m, decay, False), next_weight
            value, total = ahead or (m, w)
            if bias_correction:
                return columns.corrected(value, total, fine), m, w
            # Return a copy of the average: a later donated step writes into the state.
            return value if ahead else columns.copied(value), m, w

        known = () if alive is None else (alive,)
        out, *new = update_averages(average, updates, state, known, [decay], own_steps, donate)
        return out, EmaState(*new)

    return GradientTransformation(init, update, numbers=[beta1, beta3], elementwise=True)
