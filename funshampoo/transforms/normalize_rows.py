"""NorMuon's row normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_flag, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import cast, compute_dtype, map_leaves, update_leaves
from funshampoo.linalg.norms import norm_over_axes
from funshampoo.operators.leaf_ops import lerp, per_block, share, sqrt
from funshampoo.operators.matrices import as_rows
from funshampoo.operators.shape_scale import Scale, check_scale, shape_factor
from funshampoo.state.stages import RowsState


def normalize_rows(
    beta2: Hyper = 0.95,
    epsilon: Hyper = 1e-8,
    *,
    scale: Scale = None,
    flatten_sides: bool = True,
) -> GradientTransformation:
    """NorMuon's row normalization: divide every row by a running root mean square of its own.

        v_i ← beta2 v_i + (1 - beta2) mean_j(U_ij²)
        N_ij = U_ij / (√v_i + epsilon),   U ← s N ‖U‖ / max(‖N‖, 1e-8)

    After `orthogonalize`, some neurons' rows are much longer than others. v starts at 0 and is not
    bias-corrected: keeping the norm makes up for that. A vector is a column, and each of its
    entries a row.

    Args:
        beta2: decay of v, in [0, 1).
        epsilon: added to the root, ≥ 0.
        scale: s, by rows and columns, as in `orthogonalize`, which may leave it to this stage.
        flatten_sides: a leaf with three sides or more has the rows of the matrix (out, the rest).
            False: all axes but the last index rows, and norms are over the last two.

    State: `RowsState`: one number per row, where Adam has one per entry.

    Raises:
        ValueError: an argument out of range.
        TypeError: from init, a leaf is sharded over ranks as a DTensor.

    Reference: Li et al., arXiv 2510.05491; microsoft/dion.

    >>> import torch
    >>> tx = normalize_rows(0.0)
    >>> w = torch.tensor([[3.0, 3.0], [1.0, 1.0]])
    >>> tx.update({"w": w}, tx.init({"w": w}))[0]
    {'w': tensor([[2.2361, 2.2361],
            [2.2361, 2.2361]])}
    """
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    check_range("epsilon", epsilon, 0.0)
    check_scale(scale)
    check_flag("flatten_sides", flatten_sides)

    def init(params: Tree, *, block_ndim: int = 0) -> RowsState:
        check_local(params, "normalize_rows")

        def zeros(p: Tensor) -> Tensor:
            rows = as_rows(p, block_ndim, flatten_sides).shape[:-1]
            return p.new_zeros(rows, dtype=compute_dtype(p))

        return RowsState(map_leaves(zeros, params))

    def update(
        updates: Tree,
        state: RowsState,
        *,
        block_ndim: int = 0,
        donate: bool = False,
        alive: Tree = None,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, RowsState]:
        decay, damping = number(beta2, hyper), number(epsilon, hyper)

        def leaf(u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            *fine, v = rest
            if not u.numel():  # the mean of nothing is NaN
                return cast(u, v.dtype), v
            x = as_rows(cast(u, v.dtype), block_ndim, flatten_sides)
            weight: Any = per_block(share(1 - decay, fine[0], v), v) if fine else 1 - decay
            v = lerp(v, x.square().mean(-1), weight, donate)
            rows = x / (sqrt(v) + damping)[..., None]
            old, new = (norm_over_axes(y, (-2, -1), keepdim=True) for y in (x, rows))
            s = shape_factor(scale, x.shape[-2:], u.shape[block_ndim:])
            return (rows * (s * old / torch.clamp(new, min=1e-8))).reshape(u.shape), v

        known = () if alive is None else (alive,)
        out, second = update_leaves(leaf, updates, (state.second,), known)
        return out, RowsState(second)

    return GradientTransformation(init, update, numbers=[beta2, epsilon])
