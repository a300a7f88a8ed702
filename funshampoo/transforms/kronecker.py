"""Kronecker-factored second-order statistics of the gradient: Shampoo's L and R."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import Block, GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.traits import OF_SIDES, with_traits
from funshampoo.core.tree import update_leaves, wide
from funshampoo.linalg.low_precision import check_product_dtype
from funshampoo.operators.exponents import Exponents, Sides, check_exponents, side_exponents
from funshampoo.operators.factors import accumulated_factor, zero_factors
from funshampoo.operators.leaf_ops import kept_share
from funshampoo.operators.mode_products import mode_flops, unfoldings
from funshampoo.operators.weights import counted, first_weights
from funshampoo.refresh.multiples import on_multiples
from funshampoo.state.stages import KroneckerState


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
    """Accumulate Shampoo's factor matrices, one per side of every block; updates pass through.

        L_i ← beta2 L_i + (1 - beta2) mat_i(G) mat_i(G)ᵀ

    mat_i(G) is the mode-i unfolding (d_i × the rest) of `gradient`, or of `updates` outside a
    scope. Later stages find L_i and the weight that corrects its bias in `KroneckerState`. The
    stored L_i is never bias-corrected and never damped.

    Args:
        beta2: decay of the average, in (0, 1]; 1 means a plain sum (AdaGrad). 0, the last gradient
            alone, is only for averages whose weight is not each block's own: for a block that was
            held, nothing would be left to divide by.
        every: accumulate at step 1 and on multiples of this; other steps skip the products and keep
            L_i. beta2 is the decay from one accumulated gradient to the next, and the weight counts
            only these, so the average reaches 1 / (1 - beta2) accumulations back, every / (1 -
            beta2) steps: beta2**every keeps the reach of beta2 on every step. Put refreshes on
            multiples of it, so that they see the gradient of their own step.
        bias_correction: count the weight from 0, so that readers divide by 1 - beta2^t.
        weighted: False drops the factor 1 - beta2: L ← beta2 L + mat matᵀ, without correction.
        exponents, sides: as in `root_inverse`; a side that these leave alone gets no factor, and
            `in_eigenbasis` leaves it alone too.
        own_steps: the weight counts each block's own gradients. False: all blocks count together,
            so that a parameter whose gradient was None is corrected by all steps.
        product_dtype: torch.bfloat16 rounds G before it is multiplied with itself, where the
            product is still in float32: float32 blocks on CUDA, outside torch.compile and
            torch.func. Elsewhere it changes nothing. L_i is never rounded to bfloat16.
        packed: store one triangle of every L_i of side 64 or more; see `operators.packed`. `init`
            decides: `update` continues with the layout it finds.

    Context: with `every` above 1, `step=` decides in torch.compile, where the counter can't be
    read. `refresh=` has no effect on statistics.

    State: `KroneckerState`, with `every` above 1 in an `EveryKState`; float32 or wider; d_i²
    numbers per side of a block, (d_i² + d_i) / 2 if packed.

    Raises:
        ValueError, TypeError: an argument out of range; the error names it.
        TypeError: from init, for a parameter that is not a dense real floating tensor.
        RuntimeError: with `every` above 1, where the step is not known.

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
    check_exponents(exponents, sides)
    check_product_dtype(product_dtype)
    check_flags(bias_correction=bias_correction, weighted=weighted)
    check_flags(own_steps=own_steps, packed=packed)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay at the same rate
    check_range("beta2", beta2, 0.0, 1.0, low_open=by_weight)

    def powers(block: Block) -> tuple[float, ...]:
        return side_exponents(block, exponents, sides)

    def init(params: Tree, *, block_ndim: int = 0) -> KroneckerState:
        check_local(params, "kronecker_statistics")
        weights = first_weights(params, block_ndim, corrects=corrected, own_steps=own_steps)
        return KroneckerState(zero_factors(params, block_ndim, powers, packed), weights)

    def update(
        updates: Tree, state: KroneckerState, params: Tree, context: Context
    ) -> tuple[Tree, KroneckerState]:
        beta, donate = number(beta2, context.hyper), context.donate
        source = updates if context.gradient is None else context.gradient
        known = () if context.alive is None else (context.alive,)
        share = 1.0 if plain_sum else 1 - beta + (beta == 1)  # a live beta of 1 makes a sum
        of_row = not (by_weight or is_exactly(beta, 1))

        def accumulate(u: Tensor, g: Tensor, *rest: Any) -> tuple[Any, ...]:
            *fine, factors = rest
            wanted = [isinstance(factor, Tensor) for factor in factors]
            if not any(wanted):
                return u, factors
            g = wide(g)
            decay = kept_share(beta, fine[0], g) if fine and of_row else beta
            new = list(factors)
            for i, x in enumerate(unfoldings(g, context.block_ndim, wanted)):
                own = new[i], x, decay, share, donate, product_dtype
                new[i] = accumulated_factor(*own, by_row=of_row)
            return u, tuple(new)

        with product_precision():
            _, factors = update_leaves(accumulate, updates, (state.factors,), (source, *known))
        weight = state.weight
        if corrected:
            weight = counted(updates, weight, beta, known, donate, own_steps)
        return updates, KroneckerState(factors, weight)

    def flops(block: Block, kept: Block) -> float:
        return mode_flops(block, [d for d, e in zip(block, powers(block)) if e > 0])

    stage = GradientTransformation(init, update, numbers=[beta2], flops=flops, passes=True)
    return with_traits(stage if every == 1 else on_multiples(stage, every), OF_SIDES)
