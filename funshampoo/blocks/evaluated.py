"""The parameters to evaluate a model with, read from a chain's state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.blocks.assembled import to_parameters
from funshampoo.core.contract import State, Tree
from funshampoo.core.tree import MaskedNode, flatten, leaf_names
from funshampoo.state.averages import AVERAGES
from funshampoo.state.nodes import check_is_state
from funshampoo.state.places import is_shared, walk_blocks
from funshampoo.state.stages import BlockedState


def evaluation_parameters(state: State, params: Tree) -> Tree:
    """The averaged weights from a chain's state, in place of the trained parameters.

    For `schedule_free`, `primal_average`, `ema_nesterov` and `tail_average`, anywhere: in chains,
    in `partition`, in `blocked`. If there are several, the last one counts.

    Args:
        state: of a transformation.
        params: the trained parameters; a parameter that no stage averages is returned as it is.

    Returns:
        A tree like params, of new tensors in the parameters' dtypes, except those not averaged.

    Raises:
        ValueError: no stage averages; parts of the state are on other ranks; the parameters are not
            those of this state.
        TypeError: the state is not a chain's.

    >>> import torch
    >>> from funshampoo import chain, scale, tail_average, update_in_place
    >>> params = {"w": torch.zeros(1)}
    >>> tx = chain(scale(-1.0), tail_average())
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     state = update_in_place(tx, {"w": -torch.ones(1)}, state, params)
    >>> params, evaluation_parameters(state, params)
    ({'w': tensor([3.])}, {'w': tensor([2.])})
    """
    check_is_state(state)
    if is_shared(state):
        raise ValueError(
            "other ranks hold a part of this state: load the merged checkpoint of all into a chain "
            "without `distribute`, and take its state."
        )
    leaves, spec = flatten(params)
    found: list[Any] = [None] * len(leaves)
    for _, node, around in walk_blocks(state):
        if not isinstance(node, AVERAGES):
            continue
        tree = node.evaluated if around is None else _assembled(node.evaluated, around, params)
        try:  # a tree with holes, if a stage does not see some leaves
            parts = spec.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                "the parameters are not those that the state was made for: another tree."
            ) from error
        found = [x if isinstance(x, Tensor) else old for x, old in zip(parts, found)]
    _check_shapes(found, params)
    if all([x is None for x in found]):
        raise ValueError(
            "no stage of this state averages: put schedule_free, primal_average, ema_nesterov or "
            "tail_average at the end of the chain, or evaluate with the parameters themselves."
        )
    pairs = zip(found, leaves)
    return spec.unflatten([p if x is None else x.to(p.dtype, copy=True) for x, p in pairs])


def _check_shapes(found: list[Any], params: Tree) -> None:
    for name, x, p in zip(leaf_names(params), found, flatten(params)[0]):
        if x is not None and x.shape != p.shape:
            raise ValueError(
                f"the parameters are not those that the state was made for: '{name}' has the shape "
                f"{tuple(p.shape)}, and its average {tuple(x.shape)}."
            )


def _assembled(stacks: Any, state: BlockedState, params: Tree) -> Tree:
    leaves, spec = flatten(params)
    here = [name in state.layout for name in leaf_names(params)]
    return to_parameters(
        stacks, state, spec.unflatten([p if x else MaskedNode() for p, x in zip(leaves, here)])
    )
