"""Averages of trees, and the total weights that correct their bias: per block or shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.tree import compute_dtype, flatten, map_leaves, update_columns
from funshampoo.operators import leaf_ops
from funshampoo.operators.columns import Column, add_weight


def full_like(params: Tree, number: float) -> Tree:
    """A tree of tensors filled with this number, in the compute dtype."""
    return map_leaves(lambda x: torch.full_like(x, number, dtype=compute_dtype(x)), params)


def first_weights(params: Tree, block_ndim: int, *, corrects: bool, own_steps: bool) -> Tree:
    """The weight of averages before their first step.

    Args:
        corrects: whether it corrects a bias, and starts at 0; else it is 1 and stays there.
        own_steps: one weight per block, (N,) or (), in its compute dtype. False: one for averages
            that count all steps, () on the CPU; float32, or float64 if a parameter is.
    """
    start = 0.0 if corrects else 1.0
    if own_steps:
        return map_leaves(
            lambda x: x.new_full(x.shape[:block_ndim], start, dtype=compute_dtype(x)), params
        )
    wide = torch.float64 in {x.dtype for x in flatten(params)[0]}
    dtype = torch.float64 if wide else torch.float32
    return torch.full((), start, dtype=dtype, device="cpu")


def first_average(
    params: Tree, block_ndim: int, *, corrects: bool, own_steps: bool
) -> tuple[Tree, Tree]:
    """An average and its weight before their first step; see `first_weights`."""
    weights = first_weights(params, block_ndim, corrects=corrects, own_steps=own_steps)
    return full_like(params, 0.0), weights


def update_averages(
    function: Callable[..., tuple[Column, ...]],
    updates: Tree,
    states: Sequence[Tree],
    inputs: Sequence[Tree],
    decays: Sequence[Hyper],
    own_steps: bool,
    donate: bool,
) -> tuple[Tree, ...]:
    """`update_columns` for states that are averages, each followed by its weight.

    Args:
        states: trees: an average, its weight as from `first_weights`, another average, ...
        decays: of the averages. For a shared weight `function` gets copies, one per leaf, which it
            updates like a leaf's own; the shared weight itself is updated once.
    """
    if own_steps:
        return update_columns(function, updates, states, inputs)
    apart = list(states)
    weights = apart[1::2]
    apart[1::2] = [map_leaves(lambda leaf, w=w: w.clone(), updates) for w in weights]
    found = list(update_columns(function, updates, apart, inputs))
    found[2::2] = [leaf_ops.add_weight(w, beta, donate) for w, beta in zip(weights, decays)]
    return tuple(found)


def counted(
    updates: Tree, weight: Tree, beta: Hyper, known: Sequence[Tree], donate: bool, own_steps: bool
) -> Tree:
    """The weights of averages after a step: one per block, or shared.

    Args:
        known: the tree of what is alive, or empty.
    """
    if not own_steps:
        return leaf_ops.add_weight(weight, beta, donate)

    def count(u: Column, *rest: Column) -> tuple[Column, Column]:
        *fine, w = rest
        return u, add_weight(w, beta, fine, donate)

    return update_columns(count, updates, (weight,), known)[1]


def weights_over(weight: Tree, tree: Tree) -> Tree:
    """A tree of weights, one per leaf: copies of a shared weight, or the tree that was given."""
    if not isinstance(weight, Tensor) or isinstance(tree, Tensor):
        return weight
    return map_leaves(lambda leaf: weight.clone(), tree)
