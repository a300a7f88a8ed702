"""Blending the updates with another method's direction, as far as the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.live import is_exactly
from funshampoo.core.modes import product_precision
from funshampoo.core.traits import refuse_steps
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.linalg.polar import schatten4
from funshampoo.operators.leaf_ops import per_block
from funshampoo.operators.matrices import as_rows, safe
from funshampoo.transforms.agreement import AgreementGate


def blend_towards(
    inner: GradientTransformation, gate: float | AgreementGate = 1.0
) -> GradientTransformation:
    """Blend U with another method's direction, inner(U), at the size of U.

        W = inner(U),   W ← W s(U)/s(W),   V = U + γ (W - U),   U ← V s(U)/s(V)

    s is the Schatten norm of order 4, √‖X Xᵀ‖, the fourth root of the sum of the singular values'
    fourth powers; for vectors and scalars it is the length. A kernel is the matrix (out, the rest).
    Where W is zero, as before `in_eigenbasis` has bases, U stays.

    Args:
        inner: turns U into another direction. Its `gradient` is U: its second moments average the
            squares of the updates that reach this stage.
        gate: γ: a number in [0, 1], or an `AgreementGate`, which compares with this `gradient`.

    State: `WrappedState`.

    Raises:
        ValueError: a number out of range; inner scales by the learning rate.

    Reference: the SOAP-Muon record, KellerJordan/modded-nanogpt, track 3 (2026).

    >>> import torch
    >>> from funshampoo import sign
    >>> w = {"w": torch.tensor([3.0, 4.0])}
    >>> tx = blend_towards(sign())
    >>> tx.update(w, tx.init(w))[0]
    {'w': tensor([3.5355, 3.5355])}
    """
    inner = as_transformation(inner)
    refuse_steps(inner, "blend_towards")
    if not isinstance(gate, AgreementGate):
        check_range("gate", gate, 0.0, 1.0)
    whole = is_exactly(gate, 1)

    def update(
        run: Callable[..., Tree],
        updates: Tree,
        own: Any,
        *,
        gradient: Tree = None,
        block_ndim: int = 0,
        clock: Tensor | None = None,
    ) -> tuple[Tree, Any]:
        def leaf(u: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor]:
            u = wide(u)
            w, size = cast(w, u.dtype), _size(u, block_ndim)
            known = _size(w, block_ndim)
            w = torch.where(known == 0, u, w / safe(known) * size)
            share: Any = gate
            if isinstance(gate, AgreementGate):
                share = gate(w, u, cast(g, u.dtype), block_ndim, clock)
            elif whole:
                return (w,)
            v = u + share * (w - u)
            return (v * (size / safe(_size(v, block_ndim))),)

        found = run(updates, gradient=updates)
        source = updates if gradient is None else gradient
        return update_leaves(leaf, updates, (), (found, source))[0], own

    def flops(block: tuple[int, ...], kept: tuple[int, ...], apart: bool) -> float:
        """Of the norms of U and W, and of V if it differs from W; `inner`'s gradient is U."""
        own = inner.flops(block, kept) - inner.flops(block, kept, apart)
        r, c = (*block[:1], math.prod(block[1:])) if len(block) > 1 else (1, math.prod(block))
        return own + (2 if whole else 3) * 2.0 * min(r, c) ** 2 * max(r, c)

    return wrapping(inner, update, name="blend_towards", flops=flops)


def _size(x: Tensor, block_ndim: int) -> Tensor:
    """The Schatten norm of order 4 of every block, (N, 1, ...)."""
    rows = as_rows(x, block_ndim)
    with product_precision():
        size = schatten4(rows if rows.shape[-2] <= rows.shape[-1] else rows.mT)
    return per_block(size.reshape(x.shape[:block_ndim]), x)
