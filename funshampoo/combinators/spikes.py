"""Gradient spikes: finite, and far above what a block's gradients have been.

    n = ‖G‖;   a spike where n > spike_factor · a, once `WARM_UP` gradients are in a
    a ← a + (n - a) / min(t + 1, 1 / (1 - DECAY)),   t gradients so far, spikes left out

a is the plain mean of the first 50 and a moving average afterwards. A gradient of exactly zero
says nothing about a block's scale: it enters no average. Once `PATIENCE` gradients above the limit
have been held since the last accepted one, the scale itself has changed: the next gradient is
accepted, whatever it is, and a restarts from it.

Nothing here waits for a device: decisions stay there, one row per block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.modes import unwrapped
from funshampoo.core.tree import flatten, map_leaves, update_leaves
from funshampoo.operators.columns import zeros_a_block
from funshampoo.operators.leaf_ops import add, lerp, multiply
from funshampoo.state.stages import SpikeState

WARM_UP = 10
"""Gradients that are accepted, and averaged, before any is judged."""

PATIENCE = 10
"""Spikes that are held before one is taken for a change of scale."""

DECAY = 0.98
"""Decay of the average, as in AdaGC."""


def no_spikes_yet(params: Tree, block_ndim: int) -> SpikeState:
    """The state before the first gradient."""
    counters = [zeros_a_block(params, block_ndim, torch.int64) for _ in range(3)]
    return SpikeState(zeros_a_block(params, block_ndim), *counters)


def above(norms: Tree, state: SpikeState, factor: Hyper) -> Tree:
    """Where ‖G‖, (N,) or (), is above the limit, accepted or not; None without a gradient."""

    def leaf(norm: Tensor | None, average: Tensor, accepted: Tensor) -> Tensor | None:
        if norm is None:
            return None
        return (norm > multiply(average, factor, donate=False)) & (accepted >= WARM_UP)

    return map_leaves(leaf, norms, state.average, state.accepted)


def held(over: Tree, state: SpikeState, alive: Tree) -> Tree:
    """Which of those above the limit are held: all until patience has run out."""

    def leaf(over: Tensor | None, pending: Tensor, fine: Tensor | None = None) -> Tensor | None:
        if over is None:
            return None
        spike = over & (pending < PATIENCE)
        return spike if fine is None else spike & (fine > 0)

    rest = (state.pending,) if alive is None else (state.pending, alive)
    return map_leaves(leaf, over, *rest)


def any_held(spikes: Tree) -> bool:
    """Whether any spike is held; True if that can't be read without waiting."""
    found = [unwrapped(x) for x in flatten(spikes)[0] if x is not None]
    return not all([x is not None and x.is_cpu and not x.any() for x in found])


def learned(
    norms: Tree, over: Tree, spikes: Tree, dead: Tree, state: SpikeState, donate: bool
) -> SpikeState:
    """The averages with this step's accepted norms, and the counters.

    Args:
        over, spikes: from `above` and `held`.
        dead: where a block is held on this step, for whatever reason; None: nowhere.
    """

    def leaf(norm: Tensor, over: Tensor, spike: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        *gone, average, accepted, pending, count = rest
        taken = norm > 0
        for mask in gone:
            taken = taken & ~mask
        anew = taken & over  # only after patience has run out
        share = (1.0 / (accepted + 1).to(average)).clamp(min=1 - DECAY)
        share = torch.where(anew, 1.0, share) * taken
        entering = torch.where(taken, norm, average)  # inf · 0 would be NaN
        return (
            norm,
            lerp(average, entering.to(average), share, donate),
            add(multiply(accepted, (~anew).to(accepted), donate), taken.to(accepted), donate),
            add(multiply(pending, (~taken).to(pending), donate), spike.to(pending), donate),
            add(count, spike.to(count), donate),
        )

    inputs = (over, spikes) if dead is None else (over, spikes, dead)
    return SpikeState(*update_leaves(leaf, norms, tuple(state), inputs)[1:])
