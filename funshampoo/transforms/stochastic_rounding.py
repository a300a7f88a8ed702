"""Stochastic rounding: small steps reach half-precision parameters on average."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Tree
from funshampoo.core.traits import ROUNDS
from funshampoo.core.tree import HALF, cast, compute_dtype, update_leaves, wide
from funshampoo.operators.columns import zeros_a_block
from funshampoo.operators.last_stage import last_stage
from funshampoo.operators.leaf_ops import add
from funshampoo.operators.rounding import random_bits, rounded_at_random
from funshampoo.state.meaning import meaning


@meaning(seen="count")
class RoundingState(NamedTuple):
    """State of `stochastic_rounding`: a tree of () int32, the steps each parameter has made."""

    seen: Tree


def stochastic_rounding() -> GradientTransformation:
    """Stochastic rounding: U ← Q(W + U) - W for W in bfloat16 or float16, Q rounding at random.

    Q rounds up or down, and the mean of Q(x) is x. Without it, W + U is rounded to nearest, and
    steps below 2^-9 of a weight in bfloat16 (2^-12 in float16) are lost, however many there are.
    With it, W moves by a whole step of its dtype as often as needed, without master weights. W + U
    itself is in float32, as master weights are: a step below 2^-25 of a weight is lost.

    Use it as the last stage of a chain, after the learning rate, also after a recipe:

        chain(soap(1e-4), stochastic_rounding())

    Parameters in float32 or float64 get the updates unchanged. The random bits are a hash of an
    entry's weight, its update and the step number (`operators.rounding`): a repeated step gives the
    same result, as do any number of ranks and any blocks. Entries with equal weight and update are
    rounded alike. A torch.compile graph whose updates differ in their last bits rounds differently,
    and equally well.

    It costs some 25 elementwise operators per parameter, which torch.compile fuses into one, and a
    chain that ends in it holds all updates at once, in float32. Derivatives treat Q as identity.

    State: `RoundingState`.

    Raises:
        ValueError: from init, inside `blocked`; from update, params missing. So do combinators that
            would change what it returns, and a chain with another stage after it (except
            `tail_average`, which changes no updates).

    Reference: Gupta et al., arXiv 1502.02551; for training in bfloat16, Zamirai et al., arXiv
    2010.06192.

    >>> import torch
    >>> tx = stochastic_rounding()
    >>> w = {"w": torch.ones(1000, dtype=torch.bfloat16)}
    >>> g = {"w": torch.linspace(0.9e-3, 1.1e-3, 1000)}  # an eighth of a step, 2^-7
    >>> (w["w"] + g["w"]).bfloat16().unique()
    tensor([1.], dtype=torch.bfloat16)
    >>> updates, _ = tx.update(g, tx.init(w), w)
    >>> updates["w"].unique(), round(updates["w"].mean().item(), 3)
    (tensor([0.0000, 0.0078]), 0.001)
    """

    def init(params: Tree, *, block_ndim: int = 0) -> RoundingState:
        if block_ndim:
            raise ValueError(
                "stochastic_rounding: inside blocked parameters are float32, whatever they are "
                "outside: put it behind, as in chain(blocked(...), stochastic_rounding())."
            )
        return RoundingState(zeros_a_block(params, 0, torch.int32))

    def update(
        updates: Tree, state: RoundingState, params: Tree, context: Context
    ) -> tuple[Tree, RoundingState]:
        def leaf(u: Tensor, w: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            seen = add(seen, torch.ones_like(seen), context.donate)
            u = cast(u, compute_dtype(w))
            if w.dtype not in HALF:
                return u, seen
            before, step = wide(w), u.detach()
            bits = random_bits([step, before.detach()], seen)
            rounded = rounded_at_random(before.detach() + step, w.dtype, bits)
            return rounded - before + (u - step), seen

        out, seen = update_leaves(leaf, updates, (state.seen,), (params,))
        return out, RoundingState(seen)

    return last_stage(init, update, traits=(ROUNDS,))
