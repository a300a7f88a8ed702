"""What a stage finds in the states of the stages before it, or misses in those of a partner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funshampoo.core.tree import MaskedNode, flatten, leaf_names
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import KroneckerState


def statistics_of(upstream: Any, stage: str, tree: Any) -> KroneckerState:
    """The factor matrices that `kronecker_statistics` or `kl_statistics` keeps of this tree.

    Args:
        upstream: of the context, in `init` or in `update`.
        stage: the name of the stage that asks, for the messages.
        tree: the parameters or the updates of that stage.

    Raises:
        ValueError: no stage before it keeps any, they are those of another tree, or a leaf has
            none.

    >>> import torch
    >>> from funshampoo import kronecker_statistics
    >>> params = {"w": torch.zeros(2, 3)}
    >>> upstream = (kronecker_statistics().init(params),)
    >>> [tuple(L.shape) for L in statistics_of(upstream, "mine", params).factors["w"]]
    [(2, 2), (3, 3)]
    """
    found = find_state(upstream, KroneckerState)
    if found is None:
        raise ValueError(
            f"{stage} found no factor matrices: put kronecker_statistics(...), or kl_statistics"
            f"(...), before it in the same chain, as in chain(kronecker_statistics(0.99), "
            f"{stage}(...))."
        )
    try:
        factors = flatten(tree)[1].flatten_up_to(found.factors)
    except ValueError as error:
        raise ValueError(
            f"{stage} found the factor matrices of other blocks: put the stage that makes them "
            f"and {stage} inside the same blocked(...)."
        ) from error
    if MaskedNode in map(type, factors):
        raise hidden_error(factors, tree, stage, "kronecker_statistics(...)")
    return found


def hidden_error(parts: Sequence[Any], tree: Any, stage: str, other: str) -> ValueError:
    """That a stage has leaves that are hidden from the one with which it is a pair, by a name.

    Args:
        parts: what the other one has of each leaf of the tree.
        stage, other: the two.
    """
    first = [isinstance(part, MaskedNode) for part in parts].index(True)
    return ValueError(
        f"{stage} found no {other} for '{leaf_names(tree)[first]}', which masked(...) or "
        "partition(...) hides from it: put a chain of the two inside of that."
    )
