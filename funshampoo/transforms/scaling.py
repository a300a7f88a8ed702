"""Diagonal methods: grafting partners inside `graft`, optimizers of their own elsewhere.

All build their second moment from `gradient`, or from `updates` where there is no scope, and apply
it to the updates. epsilon stands outside the root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, identity, renamed
from funshampoo.core.live import is_exactly, number
from funshampoo.core.modes import is_plain
from funshampoo.core.tree import cast, compute_dtype, map_leaves, update_columns
from funshampoo.operators.by_number import by_number
from funshampoo.operators.columns import (
    Column,
    add,
    average,
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
from funshampoo.operators.leaf_ops import scalar, sqrt
from funshampoo.state.stages import AdagradState, AdamState, RmsState
from funshampoo.transforms.momentum import zeros_like


def scale_by_sgd() -> GradientTransformation:
    """The identity: as a grafting partner it gives P the norm of the (filtered) gradient.

    >>> scale_by_sgd().update({"w": 1.0}, ())[0]
    {'w': 1.0}
    """
    return renamed(identity(), "scale_by_sgd")


def scale_by_adam(
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    epsilon: Hyper = 1e-8,
    *,
    weighted: bool = True,
    own_steps: bool = True,
) -> GradientTransformation:
    """Adam: bias-corrected first moment over the root of the bias-corrected second moment.

        M ← beta1 M + (1 - beta1) U,   V ← beta2 V + (1 - beta2) G²
        U ← M/(1 - beta1^t) / (√(V/(1 - beta2^t)) + epsilon)

    Args:
        beta1: decay of the first moment, in [0, 1). The number 0 keeps none: as a grafting partner,
            where an `ema` has filtered the updates already.
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root, ≥ 0.
        weighted: False: V ← beta2 V + G², without correction of V.
        own_steps: count each block's own gradients for the corrections; False: all together.

    State: `AdamState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Kingma and Ba, arXiv 1412.6980. Agrees with torch.optim.Adam.

    >>> import torch
    >>> tx = scale_by_adam(epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 1.0000, -1.0000])}
    """
    check_range("beta1", beta1, 0.0, 1.0, high_open=True)
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    check_range("epsilon", epsilon, 0.0)
    check_flags(weighted=weighted, own_steps=own_steps)
    filtered = not is_exactly(beta1, 0)

    def init(params: Tree, *, block_ndim: int = 0) -> AdamState:

        def weights(corrects: bool) -> Tree:
            return first_weights(params, block_ndim, corrects=corrects, own_steps=own_steps)

        second = (zeros_like(params), weights(weighted))
        if not filtered:
            return AdamState((), (), *second)
        return AdamState(zeros_like(params), weights(True), *second)

    def update(
        updates: Tree, state: AdamState, params: Tree, context: Context
    ) -> tuple[Tree, AdamState]:
        decay1, decay2, damping = [number(x, context.hyper) for x in (beta1, beta2, epsilon)]
        donate = context.donate

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, ...]:
            (*fine, v, w), filters = (rest[:-2], rest[-2:]) if filtered else (rest, ())
            divisor = None
            if filtered:
                m, n = filters
                u = cast_like(u, m)
                m, n = filters = average_of(m, n, u, decay1, fine, donate, by_weight=own_steps)
                u, divisor = m, per_block(seen(n, fine), m)
            squares = _squares(g, v)
            if weighted:
                v, w = average_of(v, w, squares, decay2, fine, donate, by_weight=own_steps)
            else:
                v = add(decayed(v, decay2, fine, donate), squares, donate)
            weight = per_block(seen(w, fine), v)
            return _scaled(u, v, damping, squares, weight, divisor), v, w, *filters

        source = updates if context.gradient is None else context.gradient
        known = () if context.alive is None else (context.alive,)
        first, weight1, second, weight2 = state
        if not own_steps:
            weight1, weight2 = weights_over(weight1, updates), weights_over(weight2, updates)
        before = (second, weight2, *((first, weight1) if filtered else ()))
        out, second, weight2, *filters = update_columns(rescale, updates, before, (source, *known))
        first, weight1 = filters or (first, weight1)
        if not own_steps:
            weight1 = count_everyone(state.first_weight, decay1, donate)
            weight2 = count_everyone(state.second_weight, decay2, donate)
        return out, AdamState(first, weight1, second, weight2)

    return GradientTransformation(init, update, numbers=[beta1, beta2, epsilon], elementwise=True)


def scale_by_rms(
    beta2: Hyper = 0.99, epsilon: Hyper = 1e-8, *, weighted: bool = True
) -> GradientTransformation:
    """RMSprop: V ← beta2 V + (1 - beta2) G², U ← U / (√V + epsilon). Not bias-corrected.

    Args:
        beta2: decay, in [0, 1).
        epsilon: added to the root, ≥ 0.
        weighted: False: V ← beta2 V + G².

    State: `RmsState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Tieleman and Hinton, 2012. Agrees with torch.optim.RMSprop.

    >>> import torch
    >>> tx = scale_by_rms(beta2=0.75, epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 2., -2.])}
    """
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    check_range("epsilon", epsilon, 0.0)
    check_flags(weighted=weighted)

    def init(params: Tree) -> RmsState:
        return RmsState(zeros_like(params))

    def update(
        updates: Tree, state: RmsState, params: Tree, context: Context
    ) -> tuple[Tree, RmsState]:
        decay, damping = number(beta2, context.hyper), number(epsilon, context.hyper)

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, Column]:
            *fine, v = rest
            squares = _squares(g, v)
            if weighted:
                v = average(v, squares, decay, fine, context.donate)
            else:
                v = add(decayed(v, decay, fine, context.donate), squares, context.donate)
            return _scaled(u, v, damping, squares), v

        source = updates if context.gradient is None else context.gradient
        known = () if context.alive is None else (context.alive,)
        out, second = update_columns(rescale, updates, (state.second,), (source, *known))
        return out, RmsState(second)

    return GradientTransformation(init, update, numbers=[beta2, epsilon], elementwise=True)


def scale_by_adagrad(
    epsilon: Hyper = 1e-10, *, initial_accumulator: float = 0.0
) -> GradientTransformation:
    """AdaGrad: V ← V + G², U ← U / (√V + epsilon).

    Args:
        epsilon: added to the root, ≥ 0.
        initial_accumulator: V before the first step, ≥ 0.

    State: `AdagradState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Duchi, Hazan, Singer, JMLR 2011. Agrees with torch.optim.Adagrad.

    >>> import torch
    >>> tx = scale_by_adagrad(epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 1., -1.])}
    """
    check_range("epsilon", epsilon, 0.0)
    check_range("initial_accumulator", initial_accumulator, 0.0)

    def init(params: Tree) -> AdagradState:

        def full(x: Tensor) -> Tensor:
            return torch.full_like(x, initial_accumulator, dtype=compute_dtype(x))

        return AdagradState(map_leaves(full, params))

    def update(
        updates: Tree, state: AdagradState, params: Tree, context: Context
    ) -> tuple[Tree, AdagradState]:
        damping = number(epsilon, context.hyper)

        def rescale(u: Column, g: Column, v: Column) -> tuple[Column, Column]:
            squares = _squares(g, v)  # of what is not alive, zeros, which change no sum
            v = add(v, squares, context.donate)
            return _scaled(u, v, damping, squares), v

        source = updates if context.gradient is None else context.gradient
        out, second = update_columns(rescale, updates, (state.second,), (source,))
        return out, AdagradState(second)

    return GradientTransformation(init, update, numbers=[epsilon], elementwise=True)


def _squares(g: Column, v: Column) -> Column:
    g = cast_like(g, v)
    return product(g, g)


def _scaled(
    u: Column,
    v: Column,
    epsilon: Hyper,
    scratch: Column,
    weight: Column | None = None,
    divisor: Column | None = None,
) -> Column:
    """u / divisor / (max(√(v / weight), √tiny) + epsilon), in v's dtypes; tiny: the least normal.

    It keeps 0/0 away, and derivatives finite; a larger epsilon makes it superfluous. Overwrites
    `scratch` where that can be: on a CPU a large new tensor costs page faults. Elsewhere and for
    small ones, foreach operators take one launch, or one loop in C++, for all leaves.
    """
    if isinstance(epsilon, Tensor) or not is_plain(u, v, weight or (), divisor or ()):
        u = cast_like(u if divisor is None else quotient(u, divisor), v)
        corrected = v if weight is None else quotient(v, weight)
        return [cast(y / (sqrt(x) + epsilon), y.dtype) for x, y in zip(corrected, u)]
    # Never on a CPU, whose numbers are those of 0.1.
    if weight is not None and not v[0].is_cpu and _joins(v, epsilon, weight, divisor):
        return _by_one_sum(cast_like(u, v), v, epsilon, weight, divisor)
    u = cast_like(u if divisor is None else quotient(u, divisor), v)
    in_scratch = any([x.is_cpu and x.numel() > _SMALL for x in scratch])
    if not in_scratch:
        root = list(torch._foreach_sqrt(v)) if weight is None else quotient(v, weight)
    elif weight is not None:
        root = [torch.div(x, w, out=y) for x, w, y in zip(v, weight, scratch)]
    else:
        root = [torch.sqrt(x, out=y) for x, y in zip(v, scratch)]
    if weight is not None:
        torch._foreach_sqrt_(root)
    least = [torch.finfo(x.dtype).tiny ** 0.5 for x in root]
    if epsilon < max(least):
        torch._foreach_clamp_min_(root, least)
    if epsilon:
        torch._foreach_add_(root, epsilon)
    if in_scratch:
        return [torch.div(x, y, out=y) for x, y in zip(u, root)]
    return list(torch._foreach_div(u, root))


_SMALL = 2**14  # numbers

_FAR = 2.0**20  # of epsilon above √tiny: then a product with any weight is above it too


def _joins(v: Column, epsilon: float, weight: Column, divisor: Column | None) -> bool:
    """Whether `_by_one_sum` takes these, on a device where a pass over memory is what a step costs.

    Not for small leaves alone: it is more launches.
    """
    if all([x.numel() <= _SMALL for x in v]):
        return False
    for x, *numbers in zip(v, weight, divisor or weight):
        if type(x) is not Tensor or any([n.device != x.device for n in numbers]):
            return False
    least: float = max([torch.finfo(x.dtype).tiny ** 0.5 for x in v])
    return epsilon >= _FAR * least


def _by_one_sum(
    u: Column, v: Column, epsilon: float, weight: Column, divisor: Column | None
) -> Column:
    """u / (divisor √(v / weight) + divisor epsilon): three passes for five or six, up to rounding.

    Of a row without a gradient u and v are 0 and the divisor is tiny: the sum must not be 0.
    """
    root, factor = list(torch._foreach_sqrt(v)), list(torch._foreach_rsqrt(weight))
    if divisor is None:
        added = [scalar(epsilon, x.dtype, x.device) for x in v]
    else:
        torch._foreach_mul_(factor, divisor)
        added = list(torch._foreach_mul(divisor, epsilon))
        torch._foreach_clamp_min_(added, [torch.finfo(x.dtype).tiny ** 0.5 for x in added])

    def sums(xs: Column, factors: Column, least: Column) -> Column:
        return [torch.addcmul(e, x, f, out=x) for x, f, e in zip(xs, factors, least)]

    def total(x: Tensor, factor: Tensor, least: Tensor) -> Tensor:
        return torch.addcmul(least, x, factor)

    return list(torch._foreach_div(u, by_number(total, root, [factor, added], sums)))
