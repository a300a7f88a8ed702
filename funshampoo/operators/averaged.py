"""The step shared by Schedule-Free and primal averaging."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.parameters import detached_parameters
from funshampoo.core.tree import cast, compute_dtype, map_leaves
from funshampoo.operators.leaf_ops import add, lerp, multiply, per_block


def copies(params: Tree) -> Tree:
    """Copies of the parameters, in their compute dtype.

    Later results are functions of the parameters and differentiated as such, except for a module's
    parameters: see `detached_parameters`.
    """
    return map_leaves(lambda p: detached_parameters([p])[0].to(compute_dtype(p), copy=True), params)


def interpolated_step(
    u: Tensor, y: Tensor, x: Tensor, z: Tensor, rate: Hyper, share: Any, beta: Hyper, donate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y' - y, x', z'): a step of the fast weights z, and of the averages that follow them.

        z' = z - rate u,   x' = (1 - share) x + share z',   y' = beta x' + (1 - beta) z'

    Args:
        u, y, x, z: direction, weights at which it was computed, average, fast weights.
        share: a number, or (N,).
    """
    z = add(z, multiply(cast(u, z.dtype), -rate, donate=False), donate)
    x = lerp(x, z, per_block(share, x) if isinstance(share, Tensor) else share, donate)
    new = lerp(z, x, beta, donate=False)
    return new - cast(y, z.dtype), x, z
