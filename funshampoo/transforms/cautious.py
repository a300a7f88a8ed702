"""Cautious updates: no step against the current gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.checks import check_flag
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.traits import refuse_steps
from funshampoo.core.tree import cast, update_leaves
from funshampoo.operators.leaf_ops import per_block


def cautious(inner: GradientTransformation, *, rescale: bool = True) -> GradientTransformation:
    """Cautious updates: U ← inner(G) where its sign agrees with G's, else 0, entry by entry.

        U = inner(G),   φ = [U G > 0],   U ← U φ / max(mean(φ), 1e-3)

    Args:
        inner: makes a direction from the gradient, without learning rate or negation.
        rescale: False skips the division. The mean is over the leaf, in `blocked` over the block.

    Raises:
        ValueError: inner scales by the learning rate: its steps all oppose the gradient.

    Reference: Liang et al., arXiv 2411.16085.

    >>> import torch
    >>> from funshampoo import trace
    >>> tx = cautious(trace(0.9), rescale=False)
    >>> state = tx.init({"w": torch.zeros(2)})
    >>> _, state = tx.update({"w": torch.tensor([1.0, 1.0])}, state)
    >>> tx.update({"w": torch.tensor([1.0, -0.5])}, state)[0]
    {'w': tensor([1.9000, 0.0000])}
    """
    inner = as_transformation(inner)
    check_flag("rescale", rescale)
    refuse_steps(inner, "cautious")

    def update(
        run: Callable[..., Tree], updates: Tree, own: tuple[()], *, block_ndim: int = 0
    ) -> tuple[Tree, tuple[()]]:
        def leaf(u: Tensor, g: Tensor) -> tuple[Tensor]:
            agrees = cast(u.sign() * cast(g, u.dtype) > 0, u.dtype)  # a product could underflow
            if rescale:
                share = agrees.reshape(*u.shape[:block_ndim], -1).mean(-1)
                agrees = agrees / per_block(torch.clamp(share, min=1e-3), u)
            return (u * agrees,)

        return update_leaves(leaf, run(updates), (), (updates,))[0], own

    return wrapping(inner, update, name="cautious", elementwise=not rescale)
