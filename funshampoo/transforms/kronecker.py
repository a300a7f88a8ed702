"""Kronecker-factored second-order statistics of the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_flag, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, is_exactly, number
from funshampoo.core.modes import full_precision
from funshampoo.core.tree import (
    cast,
    check_local,
    compute_dtype,
    map_leaves,
    update_columns,
    update_leaves,
)
from funshampoo.linalg.low_precision import check_product_dtype, rounded_gram
from funshampoo.operators.columns import (
    Column,
    add_weight,
    count_everyone,
    first_weights,
)
from funshampoo.operators.exponents import Exponents, check_exponents, inverse_exponents
from funshampoo.operators.leaf_ops import add, add_gram, kept_share, multiply, per_block
from funshampoo.operators.mode_products import unfoldings
from funshampoo.operators.packed import like, packed_shape, packs
from funshampoo.operators.packed_statistics import add_packed_gram
from funshampoo.state.stages import KroneckerState

Sides = Callable[[tuple[int, ...]], Sequence[bool]]


def kronecker_statistics(
    beta2: Hyper = 0.99,
    *,
    bias_correction: bool = True,
    weighted: bool = True,
    exponents: Exponents | None = None,
    sides: Sides | None = None,
    own_steps: bool = True,
    product_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> GradientTransformation:
    """Accumulate one factor matrix for every side of every block; pass the updates through.

        L_i ← beta2 L_i + (1 - beta2) mat_i(G) mat_i(G)ᵀ

    mat_i(G) is the mode-i unfolding (d_i × the rest) of `gradient`, or of `updates` where there is
    no scope. Later stages find L_i and the weight that corrects its bias in `KroneckerState`; the
    stored L_i is never corrected and never damped.

    Args:
        beta2: decay of the average, in (0, 1]; 1 means a plain sum (AdaGrad).
        bias_correction: count the weight from 0, so that readers divide by 1 - beta2^t.
        weighted: False drops the factor 1 - beta2: L ← beta2 L + mat matᵀ, without correction.
        exponents: as in `root_inverse`; a side whose exponent is 0 gets no factor.
        sides: the shape of a block -> a bool a side; one for which it is False gets no factor. For
            `in_eigenbasis`, which leaves such a side alone.
        own_steps: the weight counts each block's own gradients. False: all blocks count together,
            so that a parameter whose gradient was None is corrected by everyone's steps.
        product_dtype: torch.bfloat16 to round G to before it is multiplied with itself, where the
            product comes in float32 all the same: float32 blocks on CUDA, outside torch.compile
            and torch.func. Elsewhere it changes nothing: L_i is never rounded to bfloat16.
        packed: keep one triangle of every L_i of side 64 or more; see `operators.packed`. `init`
            decides: `update` goes on with what it finds.

    State: `KroneckerState`, float32 at least, d_i² numbers a side of a block, (d_i² + d_i) / 2 of
    them if packed.

    Raises:
        ValueError: beta2 or an exponent out of range.
        TypeError: from init, for a parameter that is not a dense real floating tensor.

    Reference: Gupta, Koren, Singer, arXiv 1802.09568; Shi et al., arXiv 2309.06497.

    >>> import torch
    >>> stage = kronecker_statistics(beta2=1.0)
    >>> params = {"w": torch.zeros(2, 3)}
    >>> _, state = stage.update({"w": torch.ones(2, 3)}, stage.init(params))
    >>> state.factors["w"][0]
    tensor([[3., 3.],
            [3., 3.]])
    """
    check_range("beta2", beta2, 0.0, 1.0, low_open=True)
    check_exponents(exponents)
    check_product_dtype(product_dtype)
    check_flag("packed", packed)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay alike

    def shape_of(d: int) -> tuple[int, int]:
        return packed_shape(d) if packs(d, packed) else (d, d)

    def init(params: Tree, *, block_ndim: int = 0) -> KroneckerState:
        check_local(params, "kronecker_statistics")

        def zero_factors(x: Tensor) -> tuple[Any, ...]:
            lead, block = x.shape[:block_ndim], tuple(x.shape[block_ndim:])
            wanted = [e > 0 for e in inverse_exponents(len(block), exponents)]
            if sides is not None:
                wanted = [w and bool(s) for w, s in zip(wanted, sides(block), strict=True)]
            return tuple(
                x.new_zeros(*lead, *shape_of(d), dtype=compute_dtype(x)) if w and x.numel() else ()
                for d, w in zip(block, wanted)
            )

        weights = first_weights(params, block_ndim, corrects=corrected, own_steps=own_steps)
        return KroneckerState(map_leaves(zero_factors, params), weights)

    def update(
        updates: Tree,
        state: KroneckerState,
        params: Tree = None,
        *,
        gradient: Tree = None,
        block_ndim: int = 0,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, KroneckerState]:
        beta = number(beta2, hyper)
        added = 1.0 if plain_sum else _share_of_new(beta)
        by_row = alive is not None and not by_weight and not is_exactly(beta, 1)

        def accumulate(u: Tensor, g: Tensor, *rest: Any) -> tuple[Any, ...]:
            *fine, factors = rest
            g = cast(g, compute_dtype(g))
            kept = kept_share(beta, fine[0], g) if by_row else beta
            accumulated = functools.partial(
                _accumulated, beta=kept, weight=added, product_dtype=product_dtype, donate=donate
            )
            wanted = [isinstance(factor, Tensor) for factor in factors]
            unfolded = unfoldings(g, block_ndim, wanted)
            new = tuple(
                () if x is None else accumulated(factor, x) for factor, x in zip(factors, unfolded)
            )
            return u, new

        def count(u: Column, *rest: Column) -> tuple[Column, Column]:
            *fine, weight = rest
            return u, add_weight(weight, beta, fine, donate)

        source = (updates if gradient is None else gradient,)
        known = () if alive is None else (alive,)
        with full_precision():
            _, factors = update_leaves(accumulate, updates, (state.factors,), source + known)
        weight = state.weight
        if corrected and own_steps:
            _, weight = update_columns(count, updates, (weight,), known)
        elif corrected:
            weight = count_everyone(weight, beta, donate)
        return updates, KroneckerState(factors, weight)

    return GradientTransformation(init, update, numbers=[beta2])


def _share_of_new(beta: Hyper) -> Hyper:
    """1 - beta2, or 1 for a plain sum."""
    if isinstance(beta, Tensor):
        return torch.where(beta == 1, torch.ones_like(beta), 1 - beta)
    return 1.0 if beta == 1 else 1 - beta


def _accumulated(
    factor: Tensor,
    x: Tensor,
    beta: Hyper,
    weight: Hyper,
    product_dtype: torch.dtype | None,
    donate: bool,
) -> Tensor:
    """beta L_i + weight x xᵀ, of x = mat_i(G); beta may be one a row, (N,)."""
    if isinstance(beta, Tensor) and beta.ndim:
        factor, beta = multiply(factor, per_block(beta, factor), donate), 1.0
    product = rounded_gram(x, product_dtype)
    if product is None:
        is_packed = factor.shape[-2] != factor.shape[-1]
        add_product = add_packed_gram if is_packed else add_gram
        return add_product(factor, x, beta, weight, donate)
    new = multiply(like(product, factor), weight, donate=True)
    return add(multiply(factor, beta, donate), new, donate)
