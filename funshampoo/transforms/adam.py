"""Adam, as an optimizer or as a partner of `graft`."""

from __future__ import annotations

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.operators.columns import (
    Column,
    add_weight,
    average_of,
    cast_like,
    lerp,
    per_block,
    seen,
)
from funshampoo.operators.over_root import over_root, squares_of
from funshampoo.operators.weights import first_average, update_averages
from funshampoo.state.stages import AdamState


def scale_by_adam(
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    epsilon: Hyper = 1e-8,
    *,
    nesterov: bool = False,
    weighted: bool = True,
    own_steps: bool = True,
) -> GradientTransformation:
    """Adam: bias-corrected first moment over the root of the bias-corrected second moment.

        M ← beta1 M + (1 - beta1) U,   V ← beta2 V + (1 - beta2) G²
        U ← M/(1 - beta1^t) / (√(V/(1 - beta2^t)) + epsilon)

    With nesterov, the numerator is the average after one more U like this one, as in NAdam:

        (beta1 M + (1 - beta1) U) / (1 - beta1^(t+1))

    Args:
        beta1: decay of the first moment, in [0, 1). The number 0 keeps none: for a grafting
            partner, where an `ema` has already filtered the updates.
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root, ≥ 0.
        nesterov: look ahead from the new M; nothing without M.
        weighted: False: V ← beta2 V + G², and V is not bias-corrected.
        own_steps: bias-correct by each block's own gradient count; False: by a common one.

    State: `AdamState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Kingma and Ba, arXiv 1412.6980; Dozat, ICLR 2016 workshop. Agrees with
    torch.optim.Adam.

    >>> import torch
    >>> tx = scale_by_adam(epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 1.0000, -1.0000])}
    """
    check_range("beta1", beta1, 0.0, 1.0, high_open=True)
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    check_range("epsilon", epsilon, 0.0)
    check_flags(nesterov=nesterov, weighted=weighted, own_steps=own_steps)
    filtered = not is_exactly(beta1, 0)

    def init(params: Tree, *, block_ndim: int = 0) -> AdamState:
        def moment(corrects: bool) -> tuple[Tree, Tree]:
            return first_average(params, block_ndim, corrects=corrects, own_steps=own_steps)

        first: tuple[Tree, Tree] = moment(True) if filtered else ((), ())
        return AdamState(*first, *moment(weighted))

    def update(
        updates: Tree, state: AdamState, params: Tree, context: Context
    ) -> tuple[Tree, AdamState]:
        decay1, decay2 = number(beta1, context.hyper), number(beta2, context.hyper)
        damping, donate = number(epsilon, context.hyper), context.donate
        known = () if context.alive is None else (context.alive,)

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, ...]:
            fine, (*first, v, w) = rest[: len(known)], rest[len(known) :]
            divisor = None
            if first:
                m, n = first
                u = cast_like(u, m)
                m, n = average_of(m, n, u, decay1, fine, donate, by_weight=own_steps)
                ahead, total = m, n
                if nesterov:
                    ahead, total = lerp(u, m, decay1, False), add_weight(n, decay1, fine, False)
                first, u, divisor = [m, n], ahead, per_block(seen(total, fine), m)
            squares = squares_of(g, v)
            options = {"by_weight": own_steps, "weighted": weighted}
            v, w = average_of(v, w, squares, decay2, fine, donate, **options)
            weight = per_block(seen(w, fine), v)
            return over_root(u, v, damping, squares, weight, divisor), *first, v, w

        source = updates if context.gradient is None else context.gradient
        second = state.second, state.second_weight
        states, decays = (state, [decay1, decay2]) if filtered else (second, [decay2])
        inputs = (source, *known)
        out, *new = update_averages(rescale, updates, states, inputs, decays, own_steps, donate)
        return out, AdamState(*new) if filtered else AdamState((), (), *new)

    return GradientTransformation(init, update, numbers=[beta1, beta2, epsilon], elementwise=True)
