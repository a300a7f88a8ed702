"""Kronecker-factored second-order statistics of the gradient."""

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
    check_exponents(exponents, sides)
    check_product_dtype(product_dtype)
    check_flags(bias_correction=bias_correction, weighted=weighted)
    check_flags(own_steps=own_steps, packed=packed)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay alike
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
        share = 1.0 if plain_sum else 1 - beta + (beta == 1)  # a sum where it is 1 by now
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
                new[i] = accumulated_factor(new[i], x, decay, share, donate, product_dtype)
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
    return stage if every == 1 else on_multiples(stage, every)
