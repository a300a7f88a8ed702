"""Spectral and sign descent of the Distributed Shampoo reference, where functions scale them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_flag
from funshampoo.core.contract import GradientTransformation, Tree, stateless
from funshampoo.core.tree import update_leaves, wide
from funshampoo.migrate.reference_config import Fields
from funshampoo.operators.leaf_ops import per_block
from funshampoo.transforms import orthogonalize, sign

ByDimensions = Callable[[int, int], float]

_NEWTON_SCHULZ = "NewtonSchulzOrthogonalizationConfig"
_SVD = "SVDOrthogonalizationConfig"


def spectral(fields: Fields) -> GradientTransformation:
    """Of a SpectralDescentPreconditionerConfig."""
    config = fields.take("orthogonalization_config", None) or {"type": _NEWTON_SCHULZ}
    nested = Fields(config, "orthogonalization_config", (_NEWTON_SCHULZ, _SVD))
    nested.drop("rank_deficient_stability_config")  # a field of the base class, unread there too
    by_dimensions = nested.take("scale_by_dims_fn", None)
    scale = None if by_dimensions is None else _of_shape(by_dimensions)
    if nested.type == _SVD:
        direction = by_svd(scale, nested.take("scale_by_nuclear_norm", False))
    else:
        a, b, c = nested.take("coefficients", (3.4445, -4.7750, 2.0315))
        direction = orthogonalize([(a, b, c)], nested.take("num_iterations", 5), scale=scale)
    nested.finish()
    return direction


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
    check_flag("scale_by_nuclear_norm", by_nuclear_norm)
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


def signs(fields: Fields) -> GradientTransformation:
    """Of a SignDescentPreconditionerConfig."""
    scale_fn = fields.take("scale_fn", None)
    return sign() if scale_fn is None else signs_scaled_by(scale_fn)


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


def _of_shape(by_dimensions: ByDimensions) -> Callable[[tuple[int, ...]], float]:
    """The reference's function of (columns, rows), of a leaf's shape."""
    return lambda shape: by_dimensions(math.prod(shape[1:]), shape[0])
