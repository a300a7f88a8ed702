"""The method for matrices, AdamW for the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.blocks.blocking import blocked
from funshampoo.blocks.layout import Merge, merged_shape
from funshampoo.combinators.guard import guarded
from funshampoo.combinators.masks import Mask, bools_of, partition
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import is_exactly
from funshampoo.core.tree import flatten
from funshampoo.recipes.diagonal import adamw
from funshampoo.recipes.in_blocks import Distribute, distributed
from funshampoo.transforms import add_decayed_weights

MATRICES, OTHERS = "matrices", "others"


def routed(
    method: GradientTransformation,
    learning_rate: Hyper | Schedule,
    matrices: Mask | None,
    others: GradientTransformation | None,
    max_failures: int | None,
    distribute: Distribute | None,
    merge: Merge = "none",
) -> GradientTransformation:
    """`method` on whole matrices, equal ones in one stack, and `others` on all other leaves.

    Args:
        method: a chain for matrices and stacks of them, learning rate included.
        learning_rate: of the AdamW that the others get by default.
        matrices: which leaves get the method: a tree of bools, a prefix of one, or a function of
            the parameters. By default all with two sides or more, by `merge`. That includes
            embeddings and heads, for which AdamW is mostly better: exclude them here.
        others: what the other leaves get; by default `adamw` with its defaults. The default, like
            the method, is `guarded`, so that a non-finite gradient is left out, and is sharded by
            `distribute`, whole leaves by size. If you pass one, it is used unchanged, since it may
            look across leaves; sharded(guarded(adamw(3e-4), by_leaf=True)) is sharded as the
            default is.
        max_failures: see `guarded`.
        distribute: `funshampoo.sharded`, to shard the matrices over data-parallel ranks, whole ones
            by the cost of their products, and the leaves of the default `others`.
        merge: which matrices a leaf is made of; see `blocked`. "none": it is one matrix.
    """
    inside = whole(method, max_failures, distribute, merge)
    if others is None:
        others = guarded(adamw(learning_rate), max_failures=max_failures, by_leaf=True)
        if distribute is not None:
            others = distributed(others, distribute, max_failures=max_failures)
    return partition({MATRICES: inside, OTHERS: others}, labelled(matrices, merge))


def whole(
    method: GradientTransformation,
    max_failures: int | None,
    distribute: Distribute | None,
    merge: Merge = "none",
) -> GradientTransformation:
    """`method` on whole parameters, equal ones in one stack, guarded, and sharded if requested.

    If it needs parameters, they are copied into stacks too, and travel with sharded gradients.
    """
    protected = guarded(method, max_failures=max_failures)
    protected = distributed(protected, distribute, max_failures=max_failures)
    return blocked(protected, None, merge=merge, with_params=bool(method.needs))


def labelled(matrices: Mask | None, merge: Merge = "none") -> Any:
    """Labels for `partition`: which leaves are matrices, by this mask or by their merged sides."""

    def is_matrix(leaf: Tensor) -> bool:
        return leaf.ndim > 1 and len(merged_shape(leaf.shape, None, merge)) > 1

    def labels(tree: Tree) -> Tree:
        leaves, spec = flatten(tree)
        if matrices is not None:
            flags = bools_of(matrices, tree, MATRICES)
        elif any([leaf is None for leaf in leaves]):
            raise ValueError(
                "a gradient is None, and without parameters nothing says whether it is a matrix's: "
                "pass params to update, or say which leaves are, by matrices=."
            )
        else:
            flags = [is_matrix(leaf) for leaf in leaves]
        return spec.unflatten([MATRICES if flag else OTHERS for flag in flags])

    return labels


def decay(weight_decay: Hyper) -> list[GradientTransformation]:
    """The stage for decoupled decay, or none if it is the number 0."""
    return [] if is_exactly(weight_decay, 0) else [add_decayed_weights(weight_decay)]
