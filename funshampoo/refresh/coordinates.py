"""A step in eigenbasis coordinates, and which rows of a stack have bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.guard import run_alive
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import Block, GradientTransformation, Tree
from funshampoo.core.tree import compute_dtype, flatten, is_one, update_columns, update_leaves
from funshampoo.linalg.norms import is_readable
from funshampoo.operators.columns import Column, add, only_alive
from funshampoo.operators.mode_products import mode_flops
from funshampoo.operators.turning import turned


def stepped(
    inner: GradientTransformation,
    updates: Tree,
    own: Any,
    params: Tree,
    kept: Tree,
    fine: Tree,
    context: Context,
) -> tuple[Tree, Any]:
    """A step of `inner` in these bases; input and output are zeros where `fine` is 0."""
    ndim = context.block_ndim
    coordinates = gradient = held(turned(updates, kept, ndim), fine)
    is_other = context.gradient is not None and not is_one(context.gradient, updates)
    if is_other and inner.reads_gradient:
        gradient = held(turned(context.gradient, kept, ndim), fine)
    inside = changed(context, gradient=gradient, alive=fine, later=(), usable=False)
    out, own = run_alive(inner, coordinates, own, params, inside)
    return turned(held(out, fine), kept, ndim, back=True), own


def coordinate_flops(reads_gradient: bool, block: Block, kept: Block, apart: bool) -> float:
    """FLOPs into the bases and back, plus into them for a `gradient` that is not the updates."""
    return (3 if apart and reads_gradient else 2) * mode_flops(block, kept)


def with_bases(updates: Tree, seen: Tree, alive: Tree) -> Tree:
    """A tree of (N,): 0 where a block has no bases yet, or is not alive; None if all are 1."""
    known = () if alive is None else (alive,)

    def leaf(u: Tensor, n: Tensor, *fine: Tensor) -> tuple[Tensor]:
        has = (n > 0).to(compute_dtype(u))
        return (has * fine[0] if fine else has,)

    counts = [n for u, n in zip(flatten(updates)[0], flatten(seen)[0]) if u is not None]
    if is_readable(counts) and all([bool((n > 0).all()) for n in counts]):
        return alive
    return update_leaves(leaf, updates, (), (seen, *known))[0]


def one_more(updates: Tree, seen: Tree, context: Context) -> Tree:
    """The gradient counts, including this gradient where it is usable."""

    def more(u: Column, *rest: Column) -> tuple[Column, Column]:
        *fine, n = rest
        one = [x > 0 for x in fine[0]] if fine else [torch.ones_like(x) for x in n]
        return u, add(n, one, context.donate)

    known = () if context.alive is None else (context.alive,)
    return update_columns(more, updates, (seen,), known)[1]


def held(tree: Tree, fine: Tree) -> Tree:
    """The tree with zeros where `fine` is 0."""
    if fine is None:
        return tree
    return update_columns(lambda u, f: (only_alive(u, [f]),), tree, (), (fine,))[0]
