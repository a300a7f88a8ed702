"""The norm of a whole tree, and gradient clipping by it."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.traits import COUPLES, with_traits
from funshampoo.core.tree import cast, compute_dtype, flatten, update_columns
from funshampoo.operators.columns import Column, shared_product
from funshampoo.operators.global_norm import clipping_factors, scaled_norm


def clip_by_global_norm(max_norm: Hyper) -> GradientTransformation:
    """Clip by global norm: U ← U max_norm / max(‖U‖, max_norm), ‖U‖ over the whole tree.

    If the norm is at most max_norm, nothing changes, bit for bit. Correct even where squares leave
    the range of U's dtype: entries of 1e30 are clipped in float32 as in float64. NaN or inf
    anywhere makes every entry NaN, to keep the error visible; `multi_steps` leaves such gradients
    out. An injected max_norm of 0 leaves zeros.

    Raises:
        ValueError: max_norm is a number that is not above 0.

    Reference: Pascanu, Mikolov, Bengio, arXiv 1211.5063.

    >>> import torch
    >>> clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, ())[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_range("max_norm", max_norm, 0.0, low_open=True, infinite=True)

    def clipped(updates: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        leaves = [x for x in flatten(updates)[0] if x is not None]
        if not leaves:
            return updates
        factors = clipping_factors(*scaled_norm(leaves), number(max_norm, hyper))

        def scaled(u: Column) -> tuple[Column]:
            dtypes = [compute_dtype(x) for x in u]
            for factor in factors:
                u = shared_product([cast(x, factor.dtype) for x in u], factor)
            return ([cast(x, dtype) for x, dtype in zip(u, dtypes)],)

        return update_columns(scaled, updates, ())[0]

    stage = stateless(clipped, "clip_by_global_norm", numbers=[max_norm])
    return with_traits(stage, COUPLES)


def global_norm(tree: Tree) -> Tensor | None:
    """Global norm √Σ‖leaf‖², on the first leaf's device, in the widest dtype; None without tensors.

    Correct whenever its dtype can represent it, even if the squares leave the range.

    >>> import torch
    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    leaves = [x for x in flatten(tree)[0] if x is not None]
    if not leaves:
        return None
    norm, scale = scaled_norm(leaves)
    return norm if scale is None else norm / scale
