"""AdaGrad, as an optimizer or as a partner of `graft`."""

from __future__ import annotations

from funshampoo.core.checks import check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import number
from funshampoo.core.tree import update_columns
from funshampoo.operators.columns import Column, add
from funshampoo.operators.over_root import over_root, squares_of
from funshampoo.operators.weights import full_like
from funshampoo.state.stages import AdagradState


def scale_by_adagrad(
    epsilon: Hyper = 1e-10, *, initial_accumulator: float = 0.0
) -> GradientTransformation:
    """AdaGrad: V ← V + G², U ← U / (√V + epsilon).

    Args:
        epsilon: added to the root, ≥ 0.
        initial_accumulator: V before the first step, ≥ 0.

    State: `AdagradState`, float32 at least.

    Raises:
        ValueError: an argument out of range.

    Reference: Duchi, Hazan, Singer, JMLR 2011. Agrees with torch.optim.Adagrad.

    >>> import torch
    >>> tx = scale_by_adagrad(epsilon=0.0)
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 1., -1.])}
    """
    check_range("epsilon", epsilon, 0.0)
    check_range("initial_accumulator", initial_accumulator, 0.0)

    def init(params: Tree) -> AdagradState:
        return AdagradState(full_like(params, initial_accumulator))

    def update(
        updates: Tree, state: AdagradState, params: Tree, context: Context
    ) -> tuple[Tree, AdagradState]:
        damping = number(epsilon, context.hyper)

        def rescale(u: Column, g: Column, v: Column) -> tuple[Column, Column]:
            squares = squares_of(g, v)  # zeros where not alive, which change no sum
            v = add(v, squares, context.donate)
            return over_root(u, v, damping, squares), v

        source = updates if context.gradient is None else context.gradient
        out, second = update_columns(rescale, updates, (state.second,), (source,))
        return out, AdagradState(second)

    return GradientTransformation(init, update, numbers=[epsilon], elementwise=True)
