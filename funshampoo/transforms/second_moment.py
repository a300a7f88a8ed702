"""A power of the second moment under the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.checks import check_choice, check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.core.tree import cast, update_columns
from funshampoo.linalg.products import power as raised
from funshampoo.operators.columns import (
    Column,
    add,
    average_of,
    cast_like,
    count_everyone,
    decayed,
    first_weights,
    per_block,
    product,
    quotient,
    seen,
    weights_over,
)
from funshampoo.operators.leaf_ops import filled, on_device, sqrt
from funshampoo.state.meaning import meaning
from funshampoo.transforms.momentum import zeros_like

Damping = Literal["added", "floor"]


@meaning(second="nonnegative", weight="weight of second")
class SecondMomentState(NamedTuple):
    """Of `scale_by_second_moment`: V, a tree like the updates, and its weight, a tree of (N,).

    The weight is () on the CPU where all blocks count together.
    """

    second: Tree
    weight: Tree


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
    """U over a power of the second moment: Adam's divisor with other exponents.

        V ← beta2 V + (1 - beta2) G²,   V̂ = V / (1 - beta2^t)
        U ← U / (V̂^exponent + epsilon),   or   U / max(V̂, epsilon)^exponent

    G is `gradient`, or the updates where there is no scope. In `in_eigenbasis` V̂ has the corrected
    eigenvalues of the Kronecker product of the factor matrices.

    Args:
        beta2: decay, in [0, 1]; the number 1 means a plain sum.
        epsilon: ≥ 0.
        exponent: above 0; 1/2 is Adam's. {order: exponent} for leaves (in `blocked`, blocks) of so
            many sides; 1/2 for those that it does not name.
        damping: "added" or "floor", the first and the second form above.
        bias_correction: divide V by its total weight.
        weighted: False drops the factor 1 - beta2: V ← beta2 V + G², without correction.
        own_steps: count each block's own gradients for the correction; False: all together.

    State: `SecondMomentState`, float32 at least.

    Raises:
        ValueError, TypeError: an argument out of range, or no number; named.

    Reference: George et al., arXiv 1806.03884; Eschenhagen et al., arXiv 2506.03595.

    >>> import torch
    >>> tx = scale_by_second_moment(0.0, epsilon=1.0)
    >>> tx.update({"w": torch.tensor([4.0, 0.0])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([0.8000, 0.0000])}
    """
    check_range("beta2", beta2, 0.0, 1.0)
    check_range("epsilon", epsilon, 0.0)
    by_order = exponent if isinstance(exponent, Mapping) else {}
    for value in by_order.values() if isinstance(exponent, Mapping) else [exponent]:
        if isinstance(value, Tensor):
            raise TypeError("exponent is a tensor; give a number, which is fixed when it is built.")
        check_range("exponent", value, 0.0, low_open=True)
    check_choice("damping", damping, ("added", "floor"))
    check_flags(bias_correction=bias_correction, weighted=weighted, own_steps=own_steps)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrects = bias_correction and not plain_sum

    def exponent_of(order: int) -> float:
        return exponent if isinstance(exponent, (int, float)) else by_order.get(order, 0.5)

    def init(params: Tree, *, block_ndim: int = 0) -> SecondMomentState:
        weights = first_weights(params, block_ndim, corrects=corrects, own_steps=own_steps)
        return SecondMomentState(zeros_like(params), weights)

    def update(
        updates: Tree, state: SecondMomentState, params: Tree, context: Context
    ) -> tuple[Tree, SecondMomentState]:
        decay, least = number(beta2, context.hyper), number(epsilon, context.hyper)
        donate = context.donate

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, Column, Column]:
            *fine, v, w = rest
            g = cast_like(g, v)
            squares = product(g, g)
            if plain_sum:
                v = add(decayed(v, decay, fine, donate), squares, donate)
            else:
                v, w = average_of(v, w, squares, decay, fine, donate, by_weight=own_steps)
            total = quotient(v, per_block(seen(w, fine), v)) if corrects else v
            powers = [exponent_of(x.ndim - context.block_ndim) for x in total]
            return quotient(cast_like(u, v), _power(total, least, powers, damping)), v, w

        known = () if context.alive is None else (context.alive,)
        source = updates if context.gradient is None else context.gradient
        weight = state.weight if own_steps else weights_over(state.weight, updates)
        out, second, weight = update_columns(
            rescale, updates, (state.second, weight), (source, *known)
        )
        if not own_steps:
            weight = count_everyone(state.weight, decay, donate) if corrects else state.weight
        return out, SecondMomentState(second, weight)

    return GradientTransformation(init, update, numbers=[beta2, epsilon], elementwise=True)


def _power(second: Column, epsilon: Hyper, exponents: Sequence[float], damping: Damping) -> Column:
    """The divisor; at least a power of the smallest normal number, which keeps 0/0 away."""
    found = []
    for v, exponent in zip(second, exponents):
        least = on_device(epsilon, v)
        if damping == "floor":
            v = torch.maximum(v, filled(v, epsilon))
        tiny = torch.finfo(v.dtype).tiny
        root = sqrt(v) if exponent == 0.5 else raised(torch.clamp(v, min=tiny), exponent)
        found.append(cast(root + least if damping == "added" else root, v.dtype))
    return found
