"""Orthogonalized updates, with all singular values about one: Muon, spectral descent."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from funshampoo.core.checks import check_choice, check_flags, check_range
from funshampoo.core.contract import EmptyState, GradientTransformation, Tree
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import update_leaves, wide
from funshampoo.linalg.polar import Norm, polar_factor, polar_flops
from funshampoo.linalg.polynomials import Polynomials, polynomials_of
from funshampoo.operators.leaf_ops import multiply
from funshampoo.operators.matrices import check_matrices
from funshampoo.operators.shape_scale import Scale, check_scale, shape_factor


def orthogonalize(
    polynomials: Polynomials = "newton_schulz",
    steps: int | None = None,
    *,
    scale: Scale = "muon",
    dtype: torch.dtype | None = None,
    epsilon: float = 1e-7,
    norm: Norm = "clamped",
    slack: float = 1.0,
    flatten_sides: bool = True,
    vectors: Literal["refuse", "pass"] = "refuse",
    gram: bool = False,
) -> GradientTransformation:
    """Orthogonalize matrices, as Muon does: U = P Σ Qᵀ becomes s P Qᵀ, by polynomials of U.

        X ← U / ‖U‖,   X ← (a + b X Xᵀ + c (X Xᵀ)²) X for each (a, b, c),   U ← s X

    The result depends on the gradient's direction only, not on its length, if that is far above
    epsilon. Matrices have to be whole: in `blocked`, use max_size=None.

    Args:
        polynomials, steps: a name of `linalg.polynomials.TABLES`, or (a, b, c) for each step.
        scale: s, by rows r and columns c: "muon" √max(1, r/c), "adam" 0.2 √max(r, c), "spectral"
            √max(r, c), "unit_rms" √(r/c), a number, None for 1, or a function of the leaf's shape;
            see `operators.shape_scale`.
        dtype: of the iteration; None: the updates', float32 or wider. torch.bfloat16 reproduces
            torch.optim.Muon's bits on a CPU.
        epsilon, norm, slack, gram: see `linalg.polar.polar_factor`.
        flatten_sides: a leaf with three sides or more, such as a kernel, is the matrix (out, the
            rest). False: a stack of matrices, one per index of all but the last two (experts).
        vectors: leaves with fewer than two sides are an error, or pass through unchanged.

    Raises:
        ValueError: an argument out of range; from init, a leaf is not a matrix (names it).
        TypeError: from init, a leaf is sharded over ranks as a DTensor.

    Reference: Jordan et al., kellerjordan.github.io/posts/muon; Amsel et al., arXiv 2505.16932.

    >>> tx = orthogonalize("polar_express_8", scale=None)
    >>> w = torch.diag(torch.tensor([3.0, -4.0]))
    >>> tx.update({"w": w}, EmptyState())[0]["w"].round(decimals=3)
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    chosen = polynomials_of(polynomials, steps)
    check_scale(scale)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype}; give a floating one, such as torch.bfloat16, or None.")
    check_range("epsilon", epsilon, 0.0)
    check_choice("norm", norm, ("clamped", "added", "schatten4"))
    check_range("slack", slack, 1.0)
    check_choice("vectors", vectors, ("refuse", "pass"))
    check_flags(flatten_sides=flatten_sides, gram=gram)
    options: Any = {"epsilon": epsilon, "norm": norm, "slack": slack, "gram": gram, "dtype": dtype}

    def init(params: Tree, *, block_ndim: int = 0) -> EmptyState:
        check_local(params, "orthogonalize")
        if vectors == "refuse":
            check_matrices(params, block_ndim)
        return EmptyState()

    def update(updates: Tree, state: EmptyState, *, block_ndim: int = 0) -> tuple[Tree, EmptyState]:
        def leaf(u: Tensor) -> tuple[Tensor]:
            x = wide(u)
            if x.ndim < block_ndim + 2 or not x.numel():
                return (x,)
            x = x.flatten(block_ndim + 1) if flatten_sides else x
            s: Any = shape_factor(scale, x.shape[-2:], u.shape[block_ndim:])
            live = isinstance(s, Tensor)
            x = polar_factor(x, chosen, scale=1.0 if live else s, **options)
            return ((multiply(x, s, donate=True) if live else x).reshape(u.shape),)

        return update_leaves(leaf, updates, ())[0], state

    def flops(block: tuple[int, ...], kept: tuple[int, ...]) -> float:
        if len(block) < 2 or not math.prod(block):
            return 0.0
        r, c = (block[0], math.prod(block[1:])) if flatten_sides else block[-2:]
        return math.prod(block) // (r * c) * polar_flops(r, c, len(chosen), gram, norm)

    return GradientTransformation(init, update, minds_alive=True, flops=flops)
