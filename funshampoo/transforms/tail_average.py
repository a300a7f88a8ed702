"""Weight averaging over the end of training."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_count, check_range
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import LATE, TRACKS
from funshampoo.core.tree import cast, update_leaves
from funshampoo.operators.averaged import copies
from funshampoo.operators.columns import zeros_a_block
from funshampoo.operators.last_stage import last_stage
from funshampoo.operators.leaf_ops import add, filled, lerp, multiply, on_device, per_block
from funshampoo.state.averages import TailAverageState


def tail_average(start: int = 1, beta: Hyper | None = None) -> GradientTransformation:
    """Average the weights after step `start` and all later ones, as x; U stays as it is.

        x ← x + (W + U - x) / n,   n = 1, 2, … from step `start` on; before it, x = W + U

    With beta, x is a bias-corrected exponential average instead of the plain one:

        x ← x + (W + U - x) (1 - beta) / (1 - beta^n)

    Put it at the end of a chain, after the learning rate. Evaluate the model with x, which is
    `funshampoo.evaluation_parameters(state, params)`.

    Args:
        start: number of the first step whose weights are in the average, from 1.
        beta: decay, in [0, 1); None: equal weights.

    State: `TailAverageState`: one number per parameter.

    Raises:
        ValueError, TypeError: an argument out of range; from update, params missing.

    Reference: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); Jain et al., arXiv 1610.03774.

    >>> import torch
    >>> tx = tail_average()
    >>> params = {"w": torch.zeros(1)}
    >>> _, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
    >>> tx.update({"w": torch.ones(1)}, state, {"w": torch.ones(1)})[1].evaluated
    {'w': tensor([1.5000])}
    """
    check_count("start", start)
    if beta is not None:
        check_range("beta", beta, 0.0, 1.0, high_open=True)
    waits = start > 1

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> TailAverageState:
        weights = zeros_a_block(params, block_ndim)
        return TailAverageState(copies(params), weights, started(waits, clock))

    def update(
        updates: Tree, state: TailAverageState, params: Tree, context: Context
    ) -> tuple[Tree, TailAverageState]:
        decay = 1.0 if beta is None else number(beta, context.hyper)
        own = 1.0 if beta is None else 1 - decay
        begun = rate_of(lambda count: count + 1 >= start, state.steps, context) if waits else 1

        def leaf(u: Tensor, p: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            new = cast(p, x.dtype) + cast(u, x.dtype)
            one = filled(weight, own)
            weight = add(multiply(weight, decay, context.donate), one, context.donate)
            share = one / weight
            if isinstance(begun, Tensor):
                here = on_device(cast(begun, x.dtype), weight)
                weight, share = weight * here, share * here + (1 - here)
            return cast(u, x.dtype), lerp(x, new, per_block(share, x), context.donate), weight

        out, x, weights = update_leaves(leaf, updates, (state.evaluated, state.weight), (params,))
        return out, TailAverageState(x, weights, advanced(state.steps, context.donate))

    return last_stage(init, update, beta, counts=waits, traits=(TRACKS, LATE), passes=True)
