"""The step that Schedule-Free and primal averaging have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.parameters import detached_parameters
from funshampoo.core.tree import cast, compute_dtype, map_leaves
from funshampoo.operators.leaf_ops import add, lerp, multiply, per_block


def copies(params: Tree) -> Tree:
    """The parameters in memory of their own, in their compute dtype.

    What is done to them later is a function of them, and differentiated as one, but for those of a
    module: see `detached_parameters`.
    """
    return map_leaves(lambda p: detached_parameters([p])[0].to(compute_dtype(p), copy=True), params)


def interpolated_step(
    u: Tensor, y: Tensor, x: Tensor, z: Tensor, rate: Hyper, share: Any, beta: Hyper, donate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y' - y, x', z'): a step of the fast weights, and of what follows them.

        z' = z - rate u,   x' = (1 - share) x + share z',   y' = beta x' + (1 - beta) z'

    Args:
        u, y, x, z: direction, weights at which it was taken, average, fast weights.
        share: a number, or (N,).
    """
    z = add(z, multiply(cast(u, z.dtype), -rate, donate=False), donate)
    x = lerp(x, z, per_block(share, x) if isinstance(share, Tensor) else share, donate)
    new = lerp(z, x, beta, donate=False)
    return new - cast(y, z.dtype), x, z
