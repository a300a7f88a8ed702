"""RMSprop, as an optimizer or as a partner of `graft`."""

from __future__ import annotations

from funshampoo.core.checks import check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import number
from funshampoo.core.tree import update_columns
from funshampoo.operators.columns import Column, add, average, decayed
from funshampoo.operators.over_root import over_root, squares_of
from funshampoo.operators.weights import full_like
from funshampoo.state.stages import RmsState


def scale_by_rms(
    beta2: Hyper = 0.99, epsilon: Hyper = 1e-8, *, weighted: bool = True
) -> GradientTransformation:
    """RMSprop: V ← beta2 V + (1 - beta2) G², U ← U / (√V + epsilon). Not bias-corrected.

    Args:
        beta2: decay, in [0, 1).
        epsilon: added to the root, ≥ 0.
        weighted: False: V ← beta2 V + G².

    State: `RmsState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Tieleman and Hinton, 2012. Agrees with torch.optim.RMSprop.

    >>> import torch
    >>> tx = scale_by_rms(beta2=0.75, epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 2., -2.])}
    """
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    check_range("epsilon", epsilon, 0.0)
    check_flags(weighted=weighted)

    def init(params: Tree) -> RmsState:
        return RmsState(full_like(params, 0.0))

    def update(
        updates: Tree, state: RmsState, params: Tree, context: Context
    ) -> tuple[Tree, RmsState]:
        decay, damping = number(beta2, context.hyper), number(epsilon, context.hyper)

        def rescale(u: Column, g: Column, *rest: Column) -> tuple[Column, Column]:
            *fine, v = rest
            squares = squares_of(g, v)
            if weighted:
                v = average(v, squares, decay, fine, context.donate)
            else:
                v = add(decayed(v, decay, fine, context.donate), squares, context.donate)
            return over_root(u, v, damping, squares), v

        source = updates if context.gradient is None else context.gradient
        known = () if context.alive is None else (context.alive,)
        out, second = update_columns(rescale, updates, (state.second,), (source, *known))
        return out, RmsState(second)

    return GradientTransformation(init, update, numbers=[beta2, epsilon], elementwise=True)
