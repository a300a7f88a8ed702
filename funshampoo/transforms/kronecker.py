"""Kronecker-factored second-order statistics of the gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_flags, check_range
from funshampoo.core.clock import advanced, refresh_due, running, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Phase, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import compute_dtype, map_leaves, update_leaves, wide
from funshampoo.linalg.low_precision import check_product_dtype, rounded_gram
from funshampoo.operators.exponents import (
    Exponents,
    Sides,
    check_exponents,
    check_sides,
    side_exponents,
)
from funshampoo.operators.leaf_ops import add, add_gram, kept_share, multiply, per_block
from funshampoo.operators.mode_products import mode_flops, unfoldings
from funshampoo.operators.packed import like, packed_shape, packs
from funshampoo.operators.packed_statistics import add_packed_gram
from funshampoo.operators.weights import counted, first_weights, weights_over
from funshampoo.state.stages import EveryKState, KroneckerState
from funshampoo.state.upstream import statistics_of


def kronecker_statistics(
    beta2: Hyper = 0.99,
    *,
    every: int = 1,
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
        beta2: decay of the average, in (0, 1]; 1 means a plain sum (AdaGrad). 0, the last gradient
            alone, is for averages whose weight is not each block's own: of a block that was held
            nothing would be left to divide by.
        every: accumulate at step 1 and on multiples of this; on other steps nothing is multiplied
            and L_i stays. beta2 is the decay from one accumulated gradient to the next, and the
            weight counts these alone, so the average reaches 1 / (1 - beta2) accumulations back,
            every / (1 - beta2) steps: beta2**every keeps the reach that beta2 has on every step.
            Let refreshes fall on multiples of it, and they see the gradient of their own step.
        bias_correction: count the weight from 0, so that readers divide by 1 - beta2^t.
        weighted: False drops the factor 1 - beta2: L ← beta2 L + mat matᵀ, without correction.
        exponents, sides: as in `root_inverse`; a side that these leave alone gets no factor.
            `in_eigenbasis` leaves such a side alone too.
        own_steps: the weight counts each block's own gradients. False: all blocks count together,
            so that a parameter whose gradient was None is corrected by everyone's steps.
        product_dtype: torch.bfloat16 to round G to before it is multiplied with itself, where the
            product comes in float32 all the same: float32 blocks on CUDA, outside torch.compile
            and torch.func. Elsewhere it changes nothing: L_i is never rounded to bfloat16.
        packed: keep one triangle of every L_i of side 64 or more; see `operators.packed`. `init`
            decides: `update` goes on with what it finds.

    Context: with `every` above 1, `step=` decides in torch.compile, where the counter can't be
    read. `refresh=` says nothing of statistics.

    State: `KroneckerState`, with `every` above 1 in an `EveryKState`; float32 at least, d_i²
    numbers a side of a block, (d_i² + d_i) / 2 of them if packed.

    Raises:
        ValueError, TypeError: an argument out of range, named.
        TypeError: from init, for a parameter that is not a dense real floating tensor.
        RuntimeError: with `every` above 1, where nobody knows the step.

    Reference: Gupta, Koren, Singer, arXiv 1802.09568; Shi et al., arXiv 2309.06497.

    >>> import torch
    >>> stage = kronecker_statistics(beta2=1.0)
    >>> params = {"w": torch.zeros(2, 3)}
    >>> _, state = stage.update({"w": torch.ones(2, 3)}, stage.init(params))
    >>> state.factors["w"][0]
    tensor([[3., 3.],
            [3., 3.]])
    """
    check_count("every", every)
    check_exponents(exponents)
    check_sides(sides)
    check_product_dtype(product_dtype)
    check_flags(bias_correction=bias_correction, weighted=weighted)
    check_flags(own_steps=own_steps, packed=packed)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay alike
    check_range("beta2", beta2, 0.0, 1.0, low_open=by_weight)

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> _State:
        check_local(params, "kronecker_statistics")

        def zero_factors(x: Tensor) -> tuple[Any, ...]:
            powers = side_exponents(tuple(x.shape[block_ndim:]), exponents, sides)
            return zero_factors_of(x, block_ndim, powers, packed)

        weights = first_weights(params, block_ndim, corrects=corrected, own_steps=own_steps)
        found = KroneckerState(map_leaves(zero_factors, params), weights)
        return found if every == 1 else EveryKState(found, started(True, clock))

    def update(updates: Tree, state: _State, params: Tree, context: Context) -> tuple[Tree, _State]:
        if isinstance(state, KroneckerState):
            return updates, accumulated(updates, state, context)
        due = _is_due(every, running(state.steps, context))
        new = accumulated(updates, state.inner, context) if due else state.inner
        return updates, EveryKState(new, advanced(state.steps, context.donate))

    def accumulated(updates: Tree, state: KroneckerState, context: Context) -> KroneckerState:
        beta = number(beta2, context.hyper)
        source = updates if context.gradient is None else context.gradient
        known = () if context.alive is None else (context.alive,)
        by_row = len(known) > 0 and not by_weight and not is_exactly(beta, 1)
        share = _Share(beta, 1.0 if plain_sum else _share_of_new(beta), by_row)
        with product_precision():
            accumulate = functools.partial(_accumulate, share, product_dtype, context)
            _, factors = update_leaves(accumulate, updates, (state.factors,), (source, *known))
        weight = state.weight
        if corrected:
            weight = counted(updates, weight, beta, known, context.donate, own_steps)
        return KroneckerState(factors, weight)

    return GradientTransformation(
        init,
        update,
        phase=functools.partial(_phase, every),
        counts=every > 1,
        numbers=[beta2],
        flops=lambda block, kept: _flops(block, side_exponents(block, exponents, sides)) / every,
        passes=True,
    )


_State: TypeAlias = KroneckerState | EveryKState


class _Share(NamedTuple):
    """L ← beta L + added mat(G) mat(G)ᵀ; beta is 1 in a row that is not alive if `by_row`."""

    beta: Hyper
    added: Hyper
    by_row: bool


def _flops(block: tuple[int, ...], powers: Sequence[float]) -> float:
    return mode_flops(block, [d for d, e in zip(block, powers) if e > 0])


def _phase(every: int, step: int) -> Phase:
    due = every > 1 and refresh_due(step, every)
    return (f"statistics, every {every}",) if due else ()


def _is_due(every: int, context: Context) -> bool:
    """Whether this step accumulates."""
    if context.step is None:
        raise RuntimeError(
            "kronecker_statistics(every=...) accumulates on some steps, and can't read the counter "
            "inside torch.compile, or where members of an ensemble are at different steps: pass "
            "step= (from 1), or let funshampoo compile (compiled(tx))."
        )
    return refresh_due(context.step, every)


def zero_factors_of(
    x: Tensor, block_ndim: int, powers: Sequence[float], packed: bool = False
) -> tuple[Any, ...]:
    """Factors of a leaf before its first gradient: zeros for every side with an exponent, or ()."""

    def zeros(d: int) -> Tensor:
        shape = packed_shape(d) if packs(d, packed) else (d, d)
        return x.new_zeros(*x.shape[:block_ndim], *shape, dtype=compute_dtype(x))

    sides = zip(x.shape[block_ndim:], powers)
    return tuple([zeros(d) if e > 0 and x.numel() else () for d, e in sides])


def _accumulate(
    share: _Share,
    product_dtype: torch.dtype | None,
    context: Context,
    u: Tensor,
    g: Tensor,
    *rest: Any,
) -> tuple[Any, ...]:
    """(u, the factors of one leaf after its gradient)."""
    *fine, factors = rest
    wanted = [isinstance(factor, Tensor) for factor in factors]
    if not any(wanted):
        return u, factors
    g = wide(g)
    beta = kept_share(share.beta, fine[0], g) if share.by_row else share.beta
    found: list[Any] = []
    for factor, x in zip(factors, unfoldings(g, context.block_ndim, wanted)):
        if x is not None:
            factor = accumulated_factor(factor, x, beta, share.added, context.donate, product_dtype)
        found.append(factor)
    return u, tuple(found)


def factors_and_weights(updates: Tree, context: Context, stage: str) -> tuple[Tree, Tree]:
    """The factor matrices upstream of this stage, and a tree of their weights."""
    statistics = statistics_of(context.upstream, stage, updates)
    return statistics.factors, weights_over(statistics.weight, updates)


def _share_of_new(beta: Hyper) -> Hyper:
    """1 - beta2, or 1 for a plain sum."""
    if isinstance(beta, Tensor):
        return torch.where(beta == 1, torch.ones_like(beta), 1 - beta)
    return 1.0 if beta == 1 else 1 - beta


def accumulated_factor(
    factor: Tensor,
    x: Tensor,
    beta: Hyper,
    weight: Hyper,
    donate: bool,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """beta L_i + weight x xᵀ, of x = mat_i(G); beta may be one a row, (N,)."""
    if isinstance(beta, Tensor) and beta.ndim:
        factor, beta = multiply(factor, per_block(beta, factor), donate), 1.0
    product = None if product_dtype is None else rounded_gram(x, product_dtype)
    if product is None:
        is_packed = factor.shape[-2] != factor.shape[-1]
        add_product = add_packed_gram if is_packed else add_gram
        return add_product(factor, x, beta, weight, donate)
    new = multiply(like(product, factor), weight, donate=True)
    return add(multiply(factor, beta, donate), new, donate)
