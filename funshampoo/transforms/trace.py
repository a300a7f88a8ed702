"""Momentum: a decaying sum of the updates."""

from __future__ import annotations

import torch

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, is_exactly, number
from funshampoo.core.tree import update_columns
from funshampoo.operators import columns
from funshampoo.operators.columns import Column
from funshampoo.operators.weights import full_like
from funshampoo.state.stages import TraceState


def trace(
    momentum: Hyper = 0.9,
    *,
    nesterov: bool = False,
    dampening: Hyper = 0.0,
    dampen_first_step: bool = True,
) -> GradientTransformation:
    """Heavy-ball momentum: a decaying sum of the updates, with optional Nesterov look-ahead.

        B ← momentum B + (1 - dampening) U
        U ← (1 - dampening) U + momentum B   if nesterov, else B

    Args:
        momentum: decay, ≥ 0 (below 1 for a bounded sum).
        nesterov: look ahead.
        dampening: share of every update to leave out, in [0, 1).
        dampen_first_step: False lets a block's first update enter B undamped, as torch.optim.SGD
            does. The Distributed Shampoo reference damps it too.

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
        seen = columns.zeros_a_block(params, block_ndim) if needs_seen else ()
        return TraceState(full_like(params, 0.0), seen)

    def update(
        updates: Tree,
        state: TraceState,
        *,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, TraceState]:
        mu, left_out = number(momentum, hyper), number(dampening, hyper)
        known = () if alive is None else (alive,)

        def accumulate(u: Column, *rest: Column) -> tuple[Column, ...]:
            fine, (b, *seen) = rest[: len(known)], rest[len(known) :]
            u = columns.only_alive(columns.cast_like(u, b), fine)
            entering = damped(u)
            if seen:
                shares = [1 - s * left_out for s in seen[0]]
                entering = columns.cast_like(columns.product(u, columns.per_block(shares, u)), b)
            b = columns.add(columns.decayed(b, mu, fine, donate), entering, donate)
            now = [columns.only_alive([torch.ones_like(x) for x in s], fine, s) for s in seen]
            if nesterov:
                return columns.add(columns.multiply(b, mu), damped(u), donate=True), b, *now
            return columns.copied(b), b, *now  # copy: a later donated step writes into the state

        def damped(u: Column) -> Column:
            return columns.multiply(u, 1 - left_out) if damps else u

        states = state if needs_seen else (state.buffer,)
        out, buffer, *seen = update_columns(accumulate, updates, states, known)
        return out, TraceState(buffer, *(seen or [state.seen]))

    return GradientTransformation(init, update, numbers=[momentum, dampening], elementwise=True)
