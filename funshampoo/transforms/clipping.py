"""Clipping: of every entry, or of the whole tree's norm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, stateless
from funshampoo.core.tree import compute_dtype, flatten, update_leaves


def clip(max_value: Hyper) -> GradientTransformation:
    """U ← min(max(U, -max_value), max_value), entry by entry.

    Raises:
        ValueError: max_value is a number that is not above 0.

    >>> import torch
    >>> clip(1.0).update({"w": torch.tensor([0.5, -3.0])}, ())[0]
    {'w': tensor([ 0.5000, -1.0000])}
    """
    check_range("max_value", max_value, 0.0, low_open=True)

    def leaf(u: Tensor) -> tuple[Tensor]:
        u = u.to(compute_dtype(u))
        limit = _limit(max_value, u)
        return (torch.clamp(u, -limit, limit),)

    def clipped(updates: Tree) -> Tree:
        return update_leaves(leaf, updates, ())[0]

    return stateless(clipped, "clip")


def clip_by_global_norm(max_norm: Hyper) -> GradientTransformation:
    """U ← U max_norm / max(‖U‖, max_norm), with the norm over the whole tree.

    Where the norm is at most max_norm nothing changes, bit for bit. A norm that is not finite makes
    every entry NaN, as it should be seen; `multi_steps` leaves such gradients out.

    Raises:
        ValueError: max_norm is a number that is not above 0.

    Reference: Pascanu, Mikolov, Bengio, arXiv 1211.5063.

    >>> import torch
    >>> clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, ())[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_range("max_norm", max_norm, 0.0, low_open=True)

    def clipped(updates: Tree) -> Tree:
        norm = global_norm(updates)
        if norm is None:
            return updates
        limit = _limit(max_norm, norm)
        factor = limit / torch.maximum(norm, limit)

        def leaf(u: Tensor) -> tuple[Tensor]:
            u = u.to(compute_dtype(u))
            return ((u * factor.to(u.device)).to(u.dtype),)

        return update_leaves(leaf, updates, ())[0]

    return stateless(clipped, "clip_by_global_norm")


def _limit(value: Hyper, like: Tensor) -> Tensor:
    """(), filled on its device: a GPU's stream would be waited for with a copy from the host."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def global_norm(tree: Tree) -> Tensor | None:
    """√Σ‖leaf‖², on the first leaf's device; None for a tree without tensors.

    >>> import torch
    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    leaves = [x for x in flatten(tree)[0] if x is not None]
    if not leaves:
        return None
    dtype = functools.reduce(torch.promote_types, [compute_dtype(x) for x in leaves])
    norms = [torch.linalg.vector_norm(x, dtype=compute_dtype(x)) for x in leaves]
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.to(leaves[0].device, dtype) for n in norms])
    )
    return total
