"""First moments: the gradient filter (an average) and momentum (a sum)."""

from __future__ import annotations

import torch

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, identity, renamed
from funshampoo.core.live import NO_NUMBERS, Numbers, is_exactly, number
from funshampoo.core.tree import compute_dtype, map_leaves, update_columns
from funshampoo.operators.columns import (
    Column,
    add,
    add_weight,
    average_of,
    cast_like,
    copied,
    corrected,
    count_everyone,
    decayed,
    first_weights,
    lerp,
    multiply,
    only_alive,
    per_block,
    product,
    weights_over,
    zeros_a_block,
)
from funshampoo.state.stages import EmaState, TraceState


def ema(
    beta1: Hyper = 0.9,
    beta3: Hyper | None = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    own_steps: bool = True,
) -> GradientTransformation:
    """The gradient filter: an exponential moving average of the updates.

        M ← beta1 M + (1 - beta1) U,    U ← M / (1 - beta1^t)

    With beta3, the update looks ahead with another decay from the old M (Lion, NAdam):

        U ← (beta3 M_old + (1 - beta3) U) / (1 - beta3 beta1^(t-1))

    With nesterov it is the average that one more U like this one would make, as in Muon; the same
    as beta3 = beta1² but for rounding:

        U ← (beta1 M + (1 - beta1) U) / (1 - beta1^(t+1))

    Args:
        beta1: decay, in [0, 1). The number 0 makes the stage the identity, without state.
        beta3: decay of the look-ahead, in [0, 1); None means beta1.
        nesterov: look ahead from the new M.
        bias_correction: divide by the total weight of the gradients in the average.
        own_steps: count each block's own gradients for that; False: all blocks count together.

    State: `EmaState`, float32 at least.

    Raises:
        ValueError: beta1 or beta3 out of range; beta3 and nesterov both given.
        TypeError: a flag that is no bool.

    Reference: Kingma and Ba, arXiv 1412.6980; for beta3 Chen et al., arXiv 2302.06675.

    >>> import torch
    >>> tx = ema(0.9)
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([1.0, 2.0])}, tx.init(params))[0]
    {'w': tensor([1., 2.])}
    """
    check_range("beta1", beta1, 0.0, 1.0, high_open=True)
    check_flags(nesterov=nesterov, bias_correction=bias_correction, own_steps=own_steps)
    if beta3 is not None:
        check_range("beta3", beta3, 0.0, 1.0, high_open=True)
        if nesterov:
            raise ValueError("beta3 and nesterov both look ahead: give one of them.")
    if is_exactly(beta1, 0):
        return renamed(identity(), "ema")

    by_weight = bias_correction and own_steps

    def init(params: Tree, *, block_ndim: int = 0) -> EmaState:
        weights = first_weights(params, block_ndim, corrects=bias_correction, own_steps=own_steps)
        return EmaState(zeros_like(params), weights)

    def update(
        updates: Tree,
        state: EmaState,
        *,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, EmaState]:
        decay, ahead_decay = number(beta1, hyper), number(beta3, hyper)

        def average(u: Column, *rest: Column) -> tuple[Column, Column, Column]:
            *fine, m, w = rest
            u = cast_like(u, m)
            ahead = None
            if ahead_decay is not None:
                ahead = average_of(m, w, u, ahead_decay, fine, False, by_weight=by_weight)
            m, w = average_of(m, w, u, decay, fine, donate, by_weight=by_weight)
            if nesterov:
                next_weight = add_weight(w, decay, fine, False) if bias_correction else w
                ahead = lerp(u, m, decay, False), next_weight
            value, total = ahead or (m, w)
            if bias_correction:
                return corrected(value, total, fine), m, w
            # The average itself as a copy: a later donated step writes into the state.
            return value if ahead else copied(value), m, w

        inputs = () if alive is None else (alive,)
        weights = state.weight if own_steps else weights_over(state.weight, updates)
        out, averages, weights = update_columns(average, updates, (state.average, weights), inputs)
        if not own_steps:
            weights = count_everyone(state.weight, decay, donate)
        return out, EmaState(averages, weights)

    return GradientTransformation(init, update, numbers=[beta1, beta3], elementwise=True)


def trace(
    momentum: Hyper = 0.9,
    *,
    nesterov: bool = False,
    dampening: Hyper = 0.0,
    dampen_first_step: bool = True,
) -> GradientTransformation:
    """Heavy-ball momentum: a decaying sum of the updates, with Nesterov's look-ahead if wanted.

        B ← momentum B + (1 - dampening) U
        U ← (1 - dampening) U + momentum B   if nesterov, else B

    Args:
        momentum: decay, ≥ 0 (below 1 for a bounded sum).
        nesterov: look ahead.
        dampening: share of every update that is left out, in [0, 1).
        dampen_first_step: False lets a block's first update in undamped, as torch.optim.SGD does.
            The Distributed Shampoo reference damps it too.

    State: `TraceState`, float32 at least.

    Raises:
        ValueError: momentum or dampening out of range.

    Reference: Sutskever et al., ICML 2013; torch.optim.SGD.

    >>> import torch
    >>> tx = trace(0.5)
    >>> state = tx.init({"w": torch.zeros(1)})
    >>> for _ in range(3):
    ...     u, state = tx.update({"w": torch.ones(1)}, state)
    >>> u
    {'w': tensor([1.7500])}
    """
    check_range("momentum", momentum, 0.0)
    check_flags(nesterov=nesterov, dampen_first_step=dampen_first_step)
    check_range("dampening", dampening, 0.0, 1.0, high_open=True)
    damps = not is_exactly(dampening, 0)
    needs_seen = damps and not dampen_first_step

    def init(params: Tree, *, block_ndim: int = 0) -> TraceState:
        seen = zeros_a_block(params, block_ndim) if needs_seen else ()
        return TraceState(zeros_like(params), seen)

    def update(
        updates: Tree,
        state: TraceState,
        *,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, TraceState]:
        mu, left_out = number(momentum, hyper), number(dampening, hyper)

        def accumulate(u: Column, *rest: Column) -> tuple[Column, ...]:
            fine, rest = ([], rest) if alive is None else ([rest[0]], rest[1:])
            b, *seen = rest
            u = only_alive(cast_like(u, b), fine)
            entering = damped(u)
            if seen:
                shares = [1 - s * left_out for s in seen[0]]
                entering = cast_like(product(u, per_block(shares, u)), b)
            b = add(decayed(b, mu, fine, donate), entering, donate)
            now = [[torch.ones_like(s) for s in column] for column in seen]
            now = [only_alive(ones, fine, s) for ones, s in zip(now, seen)]
            if nesterov:
                return add(multiply(b, mu), damped(u), donate=True), b, *now
            return copied(b), b, *now  # copies: a later donated step writes into the state

        def damped(u: Column) -> Column:
            return multiply(u, 1 - left_out) if damps else u

        inputs = () if alive is None else (alive,)
        states = (state.buffer, state.seen) if needs_seen else (state.buffer,)
        out, buffer, *seen = update_columns(accumulate, updates, states, inputs)
        return out, TraceState(buffer, seen[0] if needs_seen else ())

    return GradientTransformation(init, update, numbers=[momentum, dampening], elementwise=True)


def zeros_like(params: Tree) -> Tree:
    """A tree of zeros in the compute dtype."""
    return map_leaves(lambda x: torch.zeros_like(x, dtype=compute_dtype(x)), params)
