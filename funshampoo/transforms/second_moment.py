"""Scaling by a power of the second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funshampoo.core.checks import check_choice, check_count, check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.operators.columns import Column, average_of, cast_like, corrected, quotient
from funshampoo.operators.over_root import Damping, power_of, squares_of
from funshampoo.operators.weights import first_average, update_averages
from funshampoo.state.stages import SecondMomentState


def scale_by_second_moment(
    beta2: Hyper = 0.99,
    epsilon: Hyper = 1e-8,
    *,
    exponent: float | Mapping[int, float] = 0.5,
    damping: Damping = "added",
    bias_correction: bool = True,
    weighted: bool = True,
    own_steps: bool = True,
) -> GradientTransformation:
    """Divide U by a power of the second moment: Adam's divisor with other exponents.

        V ← beta2 V + (1 - beta2) G²,   V̂ = V / (1 - beta2^t)
        U ← U / (V̂^exponent + epsilon),   or   U / max(V̂, epsilon)^exponent

    G is `gradient`, or the updates outside a scope. In `in_eigenbasis`, V̂ holds the corrected
    eigenvalues of the Kronecker product of the factor matrices.

    Args:
        beta2: decay, in [0, 1]; the number 1 means a plain sum.
        epsilon: ≥ 0.
        exponent: above 0; 1/2 is Adam's. {order: exponent} for leaves (in `blocked`, blocks) with
            that many sides; 1/2 for orders that it does not name.
        damping: "added" or "floor": the first and the second form above.
        bias_correction: divide V by its total weight.
        weighted: False drops the factor 1 - beta2: V ← beta2 V + G², without correction.
        own_steps: bias-correct by each block's own gradient count; False: by a common one.

    State: `SecondMomentState`, float32 at least.

    Raises:
        ValueError, TypeError: an argument out of range, or not a number; the error names it.

    Reference: George et al., arXiv 1806.03884; Eschenhagen et al., arXiv 2506.03595.

    >>> import torch
    >>> tx = scale_by_second_moment(0.0, epsilon=1.0)
    >>> tx.update({"w": torch.tensor([4.0, 0.0])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([0.8000, 0.0000])}
    """
    check_range("beta2", beta2, 0.0, 1.0)
    check_range("epsilon", epsilon, 0.0)
    by_order: Any = exponent if isinstance(exponent, Mapping) else {None: exponent}
    for order in by_order.keys() - {None}:
        check_count("an order in exponent", order, 0)
    for value in by_order.values():
        if isinstance(value, Tensor):
            raise TypeError("exponent is a tensor; give a number, which is fixed when it is built.")
        check_range("exponent", value, 0.0, low_open=True)
    check_choice("damping", damping, ("added", "floor"))
    check_flags(bias_correction=bias_correction, weighted=weighted, own_steps=own_steps)
    usual = by_order.get(None, 0.5)
    averages = weighted and not is_exactly(beta2, 1)
    corrects = bias_correction and averages
    options = {"by_weight": own_steps, "weighted": averages}

    def init(params: Tree, *, block_ndim: int = 0) -> SecondMomentState:
        return SecondMomentState(
            *first_average(params, block_ndim, corrects=corrects, own_steps=own_steps)
        )

    def update(
        updates: Tree, state: SecondMomentState, params: Tree, context: Context
    ) -> tuple[Tree, SecondMomentState]:
        decay, least = number(beta2, context.hyper), number(epsilon, context.hyper)
        donate = context.donate

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, Column, Column]:
            *fine, v, w = rest
            squares = squares_of(g, v)
            v, w = average_of(v, w, squares, decay, fine, donate, **options)
            total = corrected(v, w, fine) if corrects else v
            powers = [by_order.get(x.ndim - context.block_ndim, usual) for x in total]
            return quotient(cast_like(u, v), power_of(total, least, powers, damping)), v, w

        source = updates if context.gradient is None else context.gradient
        inputs = (source,) if context.alive is None else (source, context.alive)
        out, *new = update_averages(rescale, updates, state, inputs, [decay], own_steps, donate)
        return out, SecondMomentState(*new)

    return GradientTransformation(init, update, numbers=[beta2, epsilon], elementwise=True)
