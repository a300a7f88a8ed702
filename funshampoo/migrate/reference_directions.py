"""Directions that the Distributed Shampoo reference has and `transforms` has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import GradientTransformation, Tree, stateless
from funshampoo.core.tree import update_leaves, wide
from funshampoo.operators.leaf_ops import per_block
from funshampoo.transforms.orthogonalize import orthogonalize


def by_svd(
    scale: Callable[[tuple[int, ...]], float] | None, by_nuclear_norm: bool
) -> GradientTransformation:
    """U ← s P Qᵀ of U = P Σ Qᵀ, by a singular value decomposition; perhaps times tr Σ.

    Directions whose singular value is exactly 0 stay 0, where the reference takes whichever LAPACK
    gives: of a gradient of zeros that is a step without a reason.

    Args:
        scale: s of the leaf's shape; None is 1.
        by_nuclear_norm: whether to multiply by the sum of the singular values.
    """
    like = orthogonalize(scale=scale)  # refuses what is no matrix

    def update(updates: Tree, state: Any, *, block_ndim: int = 0) -> tuple[Tree, Any]:
        def leaf(u: Tensor) -> tuple[Tensor]:
            x = wide(u).flatten(block_ndim + 1)
            P, sizes, Q = torch.linalg.svd(x, full_matrices=False)
            found = (P * (sizes > 0)[..., None, :]) @ Q
            if by_nuclear_norm:
                found = found * sizes.sum(-1)[..., None, None]
            s = 1.0 if scale is None else scale(tuple(u.shape[block_ndim:]))
            return (found.reshape(u.shape) * s,)

        return update_leaves(leaf, updates, ())[0], state

    return GradientTransformation(like.init, update, "by_svd", minds_alive=True)


def signs_scaled_by(scale_fn: Callable[[Tensor], Any]) -> GradientTransformation:
    """U ← s(U) sign(U), with a function of each block that returns a number or a tensor ().

    It is called once for all blocks of a shape, under torch.func.vmap: what it reads on the host,
    as by .item(), is an error of torch.
    """

    def one(u: Tensor) -> Tensor:
        s = torch.as_tensor(scale_fn(u), dtype=u.dtype, device=u.device)
        if s.shape != ():
            raise ValueError(
                f"scale_fn gives a tensor of shape {tuple(s.shape)}; it has to give a number, or a "
                "tensor of shape ()."
            )
        return s

    def scaled(updates: Tree, *, block_ndim: int = 0) -> Tree:
        def leaf(u: Tensor) -> tuple[Tensor]:
            u = wide(u)
            each: Any = torch.func.vmap(one) if block_ndim else one
            return (u.sign() * per_block(each(u), u),)

        return update_leaves(leaf, updates, ())[0]

    return stateless(scaled, "sign")
