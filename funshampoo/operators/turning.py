"""Rotation of trees of blocks, and of states of elementwise stages, between bases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Tree
from funshampoo.core.modes import full_precision, product_precision
from funshampoo.core.traced_tree import dict_like
from funshampoo.core.tree import update_leaves, wide
from funshampoo.operators.leaf_ops import per_block
from funshampoo.operators.mode_products import precondition, rotate
from funshampoo.state.meaning import kind_of


def turned(tree: Tree, kept: Tree, block_ndim: int, back: bool = False) -> Tree:
    """Coordinates in the bases; with `back`, the blocks from their coordinates."""
    return _products(functools.partial(rotate, block_ndim=block_ndim, back=back), tree, kept)


def preconditioned(
    tree: Tree, kept: Tree, block_ndim: int, product_dtype: torch.dtype | None
) -> Tree:
    """The products with the roots of all sides."""
    product = functools.partial(precondition, block_ndim=block_ndim, product_dtype=product_dtype)
    return _products(product, tree, kept)


def _products(product: Callable[..., Tensor], tree: Tree, kept: Tree) -> Tree:
    def leaf(u: Tensor, units: Any) -> tuple[Tensor]:
        return (product(wide(u), matrices_of(units)) if any(units) else wide(u),)

    with product_precision():
        return update_leaves(leaf, tree, (), (kept,))[0]


def carried(state: Any, updates: Tree, before: Tree, after: Tree, block_ndim: int) -> Any:
    """A state with its linear fields rotated into the new bases, in rows whose bases are new."""

    def leaf(u: Tensor, old: Any, new: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        renewed = [unit.rounds != was.rounds for was, unit in zip(old, new) if unit]
        if not renewed:
            return u, x
        whole = rotate(x, matrices_of(old), block_ndim, back=True)
        turned = rotate(whole, matrices_of(new), block_ndim)
        some = functools.reduce(torch.logical_or, renewed)
        return u, torch.where(per_block(some, x), turned, x)

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return dict_like(node, {key: visit(child) for key, child in node.items()})
        fields = getattr(type(node), "_fields", None)
        if fields is None:
            return type(node)(map(visit, node)) if isinstance(node, (tuple, list)) else node
        return type(node)(*[visited(node, field) for field in fields])

    def visited(node: Any, field: str) -> Any:
        child = getattr(node, field)
        if kind_of(type(node), field) != "linear":
            return visit(child)
        if isinstance(child, tuple) and not child:  # a part that is switched off
            return child
        return update_leaves(leaf, updates, (child,), (before, after))[1]

    with full_precision():
        return visit(state)


def matrices_of(units: Any) -> list[Tensor | None]:
    """The root or basis of each side, from its `Kept`; None for a side without."""
    return [unit.value[0] if unit else None for unit in units]
