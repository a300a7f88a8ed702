"""Kronecker-factored second-order statistics of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.base import GradientTransformation, Hyper, Tree
from funshampoo.checks import check_range
from funshampoo.state.stages import KroneckerState
from funshampoo.transforms.exponents import Exponents, check_exponents, inverse_exponents
from funshampoo.transforms.leaf_ops import add_gram, add_weight
from funshampoo.tree import check_parameters, compute_dtype, map_leaves, update_leaves


def kronecker_statistics(
    beta2: Hyper = 0.99,
    *,
    bias_correction: bool = True,
    weighted: bool = True,
    exponents: Exponents | None = None,
    own_steps: bool = True,
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
        own_steps: the weight counts each block's own gradients. False: all blocks count together,
            so that a parameter whose gradient was None is corrected by everyone's steps.

    State: `KroneckerState`, float32 at least, d_i² numbers a side of a block.

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
    plain_sum = not weighted or (isinstance(beta2, float | int) and beta2 == 1)
    corrected = bias_correction and not plain_sum
    added: Hyper = 1.0 if plain_sum else 1 - beta2
    if isinstance(beta2, Tensor) and not plain_sum:
        added = torch.where(beta2 == 1, torch.ones_like(beta2), 1 - beta2)

    def init(params: Tree, *, block_ndim: int = 0) -> KroneckerState:
        check_parameters(params, "kronecker_statistics")

        def zero_factors(x: Tensor) -> tuple[Any, ...]:
            lead, sides = x.shape[:block_ndim], x.shape[block_ndim:]
            powers = inverse_exponents(len(sides), exponents)
            return tuple(
                x.new_zeros(*lead, d, d, dtype=compute_dtype(x)) if e and x.numel() else ()
                for d, e in zip(sides, powers)
            )

        def weight(x: Tensor) -> Tensor:
            start = 0.0 if corrected else 1.0
            return x.new_full(x.shape[: block_ndim * own_steps], start, dtype=compute_dtype(x))

        return KroneckerState(map_leaves(zero_factors, params), map_leaves(weight, params))

    def update(
        updates: Tree,
        state: KroneckerState,
        params: Tree = None,
        *,
        gradient: Tree = None,
        block_ndim: int = 0,
        donate: bool = False,
    ) -> tuple[Tree, KroneckerState]:
        def accumulate(u: Tensor, g: Tensor, factors: Any, weight: Tensor) -> tuple[Any, ...]:
            g = g.to(compute_dtype(g))
            new = tuple(
                add_gram(factor, unfold(g, side, block_ndim), beta2, added, donate)
                if isinstance(factor, Tensor)
                else ()
                for side, factor in enumerate(factors)
            )
            return u, new, add_weight(weight, beta2, donate) if corrected else weight

        source = updates if gradient is None else gradient
        trees = update_leaves(accumulate, updates, (state.factors, state.weight), (source,))
        return trees[0], KroneckerState(*trees[1:])

    return GradientTransformation(init, update)


def unfold(x: Tensor, side: int, block_ndim: int = 0) -> Tensor:
    """mat_i: the mode-i unfolding of every block, (N, d_i, the rest). A view where it can be.

    >>> unfold(torch.arange(6).reshape(2, 3), side=1)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    moved = x.movedim(block_ndim + side, block_ndim)
    return moved.reshape(*moved.shape[: block_ndim + 1], -1)


def bias_corrected(factor: Tensor, weight: Tensor) -> Tensor:
    """L_i / weight, a new tensor; a weight of 0 (no gradient yet) leaves zeros."""
    safe = torch.where(weight > 0, weight, torch.ones_like(weight))
    return factor / safe[..., None, None]
