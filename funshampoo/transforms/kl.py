"""KL-Shampoo's statistics: each side's factor, whitened along the other sides."""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch import Tensor

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.traits import OF_SIDES, with_traits
from funshampoo.core.tree import map_leaves, update_leaves, wide
from funshampoo.operators.exponents import Sides, check_sides, wanted_sides
from funshampoo.operators.factors import accumulated_factor, zero_factors
from funshampoo.operators.kl import (
    WHITENED,
    Block,
    Least,
    check_through,
    first_eigenvalues,
    kl_flops,
)
from funshampoo.operators.leaf_ops import kept_share
from funshampoo.operators.mode_products import unfold
from funshampoo.operators.weights import counted, first_weights, weights_over
from funshampoo.state.eigenbases import KlState
from funshampoo.state.partners import kept_later
from funshampoo.state.stages import KroneckerState


def kl_statistics(
    beta2: Hyper = 0.98,
    *,
    through: Literal["eigenvalues", "ritz", "roots"] = "eigenvalues",
    initial_eigenvalue: float = 0.1,
    least_eigenvalue: Least = 0.0,
    damping: Hyper = 0.0,
    bias_correction: bool = True,
    weighted: bool = True,
    normalized: bool = True,
    own_steps: bool = True,
    starts_whole: bool = False,
    in_turn: bool = False,
    sides: Sides | None = None,
) -> GradientTransformation:
    """Accumulate KL-Shampoo's factor matrices: one per side, whitened along the other sides.

        L_i ← beta2 L_i + (1 - beta2) (d_i / n) mat_i(G_i) mat_i(G_i)ᵀ
        G_i = G ×_j S_j^(-1/2)   over the other sides j,   n = d_1 ⋯ d_k

    The L_i minimize the KL divergence between a Gaussian with the gradient's second moment and one
    with the covariance L_1 ⊗ … ⊗ L_k. S_j is the estimate of L_j from before this step, taken from
    a later stage of the chain:

    - "roots": G_i is G preconditioned by the X_j of `root_inverse`, whose exponents should be 1/2:
      L_j^(-1/2);
    - "eigenvalues": S_j = Q_j diag(λ_j) Q_jᵀ with the bases of `in_eigenbasis`, however old, and
      separate eigenvalues, updated on every step from the gradient's coordinates in the bases:

          R = G ×_1 Q_1ᵀ … ×_k Q_kᵀ
          λ_i ← beta2 λ_i + (1 - beta2) (mean over the other sides of (R ×_j λ_j^(-1/2))²
                                         + damping Π_j mean(1 / λ_j))

      A block's first gradient finds no bases: its L_i are plain and λ_i keeps its initial value;
    - "ritz": the same with λ_j = diag(Q_jᵀ L_j Q_j) / weight, at the cost of a product of d³ per
      side. A block's first gradient finds no L_j: all λ_j are least_eigenvalue.

    Args:
        beta2: decay of all averages, in [0, 1); with "roots" the number 1 gives a plain sum.
        through: see above.
        initial_eigenvalue: initial λ_i, above 0; like damping, only with "eigenvalues".
        least_eigenvalue: a floor, or a function of d_i: ≥ 0, for updated λ_i (except that an
            eigenvalue of exactly 0 stays, and its direction is left out); above 0, for Ritz values.
            Not with "roots", which the epsilon of `root_inverse` bounds.
        damping: ≥ 0, see above.
        bias_correction, weighted, own_steps: as in `kronecker_statistics`; for L_i only.
        normalized: False omits the factor d_i / n of L_i, for a matrix 1 / (the other side).
        starts_whole: a block's first gradient enters L_i with weight 1 instead of 1 - beta2. Only
            with "eigenvalues" and bias_correction=False.
        in_turn: only with "eigenvalues": of three sides, some use eigenvalues that others got on
            this step, as in the published code: λ of the second uses the third's, λ and L of
            the first use the second's.
        sides: as in `kronecker_statistics`; a side with False gets no factor matrix. With
            "eigenvalues" it still has λ_i, in the unrotated coordinates.

    Without a floor, or that epsilon, a stretch of zero gradients lets eigenvalues decay to nothing:
    the first gradient after it makes a step as much too long, and later ones are too short for as
    long as the averages remember its whitened squares, which are kept finite.

    State: `KlState`; per side of a block, d_i² numbers for L_i, and d_i for λ_i.

    Raises:
        ValueError: an argument out of range, or with the wrong `through`; from update, no later
            stage has such values, or other statistics stand between.
        TypeError: a flag that is not a bool.
        TypeError: from init, for a parameter that is not a dense real floating tensor.

    Reference: Lin et al., arXiv 2509.03378; "ritz" as in NVIDIA-NeMo/Emerging-Optimizers.

    >>> import torch
    >>> from funshampoo import chain, in_eigenbasis, scale_by_adam
    >>> tx = chain(kl_statistics(0.5), in_eigenbasis(scale_by_adam(), every=1))
    >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     _, state = tx.update(w, state)
    >>> state["kl_statistics"].eigenvalues["w"][0]  # in a basis: largest last
    tensor([ 2.5500, 10.0500])
    """
    check_range("beta2", beta2, 0.0, 1.0, high_open=through != "roots")
    check_range("damping", damping, 0.0)
    check_range("initial_eigenvalue", initial_eigenvalue, 0.0, low_open=True)
    check_flags(bias_correction=bias_correction, weighted=weighted, normalized=normalized)
    check_flags(own_steps=own_steps, starts_whole=starts_whole, in_turn=in_turn)
    check_sides(sides)
    flags = {"starts_whole": starts_whole, "in_turn": in_turn}
    given = {"damping": not is_exactly(damping, 0), "initial_eigenvalue": initial_eigenvalue != 0.1}
    check_through(through, least_eigenvalue, bias_correction, **flags, **given)
    numbers_read = [beta2, damping] if through == "eigenvalues" else [beta2]
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay at the same rate

    def init(params: Tree, *, block_ndim: int = 0) -> KlState:
        check_local(params, "kl_statistics")
        factors = zero_factors(params, block_ndim, lambda block: wanted_sides(block, sides))
        weights = first_weights(params, block_ndim, corrects=corrected, own_steps=own_steps)
        eigenvalues = map_leaves(lambda x: (), params)
        if through == "eigenvalues":
            eigenvalues = first_eigenvalues(params, block_ndim, initial_eigenvalue)
        return KlState(KroneckerState(factors, weights), eigenvalues)

    def update(
        updates: Tree, state: KlState, params: Tree, context: Context
    ) -> tuple[Tree, KlState]:
        beta, ndim, donate = number(beta2, context.hyper), context.block_ndim, context.donate
        numbers = {"beta": beta, "damping": number(damping, context.hyper), **flags}
        (factors, weight), eigenvalues = state
        known = () if context.alive is None else (context.alive,)
        share = 1.0 if plain_sum else 1 - beta
        of_row = not (by_weight or is_exactly(beta, 1))

        def accumulate(u: Tensor, g: Tensor, units: Any, n: Any, *rest: Any) -> tuple[Any, ...]:
            *fine, w, old, values = rest
            g = wide(g)
            block = Block(g, ndim, units, n, fine, w, old, values)
            parts, values = WHITENED[through](block, least=least_eigenvalue, **numbers)
            decay = kept_share(beta, fine[0], g) if fine and of_row else beta
            new = []
            for i, (L, part) in enumerate(zip(old, parts)):
                x = unfold(part, i, ndim)
                own = share / max(x.shape[-1], 1) if normalized else share
                new.append(accumulated_factor(L, x, decay, own, donate, by_row=of_row))
            return u, tuple(new), values

        source = updates if context.gradient is None else context.gradient
        later = kept_later(context.later, through, updates)
        inputs = (source, *later, *known, weights_over(weight, updates))
        with product_precision():
            states = factors, eigenvalues
            _, factors, eigenvalues = update_leaves(accumulate, updates, states, inputs)
        if corrected:
            weight = counted(updates, weight, beta, known, donate, own_steps)
        return updates, KlState(KroneckerState(factors, weight), eigenvalues)

    flops = functools.partial(kl_flops, through, sides)
    stage = GradientTransformation(init, update, numbers=numbers_read, flops=flops, passes=True)
    return with_traits(stage, OF_SIDES)
