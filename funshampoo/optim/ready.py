"""A state for a parameter group, fresh or carried over, with the parameters it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.modes import for_keeps
from funshampoo.core.parameters import detached
from funshampoo.distributed.gathering import gathered
from funshampoo.optim.building import Built
from funshampoo.optim.entries import parted
from funshampoo.state.checkpoint import carried_over, named_tensors
from funshampoo.state.nodes import walk
from funshampoo.state.parts import part_of
from funshampoo.state.places import block_names
from funshampoo.state.stages import BlockedState, LearningRateState

ByParameter = dict[Tensor, dict[str, Tensor]]  # without what is shared
Left = dict[Tensor, dict[str, Tensor]]  # of those in no group yet or any more, with what is shared
Look = tuple[Any, ...]


class Known(NamedTuple):
    """A parameter as the state was made for it."""

    name: str
    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class Plan(NamedTuple):
    """What the next step of a group is of; nothing has been made for it yet.

    Attributes:
        look: how the group looks.
        goes_on: whether the state of the last step is one for this.
        is_edited: whether it takes anything else than going on: another chain, state, reset.
        anew: the parameters that start from nothing.
    """

    built: Built
    known: list[Known]
    look: Look
    goes_on: bool
    is_edited: bool
    anew: Set[Tensor] = frozenset()


class Ready(NamedTuple):
    """A state for a group, with the chain and the parameters that it belongs to.

    Attributes:
        look: how the group looked when it was made for it.
        fresh: whether nothing but `init` has made it, of parameters as they were then.
    """

    built: Built
    known: list[Known]
    state: Any
    look: Look = ()
    fresh: bool = False


def same_parameters(a: list[Known], b: list[Known]) -> bool:
    """Whether a state for the one is a state for the other."""
    return len(a) == len(b) and all(
        x.parameter is y.parameter and x.name == y.name and x[2:] == y[2:] for x, y in zip(a, b)
    )


def fresh(built: Built, known: list[Known]) -> Any:
    """A state that can be stepped, whatever mode the caller is in."""
    assert built.transformation is not None
    with for_keeps():
        state = built.transformation.init({k.name: detached(k.parameter) for k in known})
    if not built.words.takes_rate:
        _check_scaled(built, state)
    return state


def _check_scaled(built: Built, state: Any) -> None:
    """The updates of a method that takes no rate are multiplied by one, here or in the method."""
    rates = any(isinstance(node, LearningRateState) for _, node in walk(state))
    if "lr" not in built.arguments and not rates:
        raise TypeError(
            "the method takes no learning rate, and nothing in it scales by one: its updates would "
            "be added as they are, uphill if they are gradients. Give lr=; or lr=None if it scales "
            "them by a negative number in another way than by scale_by_learning_rate."
        )


def says_nothing(loaded: Any, made: Any) -> bool:
    """Whether a loaded state is what `init` makes, so that nothing of it has to be kept.

    Not of what ranks share, who would have to agree on it.
    """
    if part_of(made).size > 1:
        return False
    pairs = zip(named_tensors(loaded), named_tensors(made))
    return all(not x.is_meta and torch.equal(x, y) for (*_, x), (*_, y) in pairs)


def carried(
    built: Built, known: list[Known], mine: ByParameter, shared: Mapping[str, Tensor], left: Left
) -> Any:
    """A state for these parameters as they are now, with what is remembered of them.

    Args:
        built: the chain that the state is for.
        known: the parameters as they are now.
        mine, shared: what the group remembers, see `GroupRun.entries`.
        left: of parameters that come from elsewhere.

    Raises:
        ValueError: it is of other blocks, or of other shapes.
    """
    flat: dict[str, Tensor] = {}
    try:
        state = fresh(built, known)
        blocks = blocks_of(state)
        for k in known:
            entries = mine.get(k.parameter, {})
            if k.parameter in left:
                entries, others = parted(left[k.parameter])
                shared = shared or others
            theirs = {entry.split("/")[0] for entry in entries if entry.startswith("block")}
            if k.name in blocks and not theirs <= blocks[k.name]:
                raise ValueError(f"'{k.name}' falls into other blocks than before.")
            flat |= {f"{k.name}/{entry}": x for entry, x in entries.items()}
        return carried_over(state, gathered(built.transformation, {**flat, **shared}))
    except ValueError as error:
        raise ValueError(
            "the parameter group was edited in a way that its state can't follow; nothing was "
            "changed. Undo it (max_size, merge, keep, or a parameter's shape), let the "
            "parameter start anew (del optimizer.state[parameter]), or go on with a new "
            f"optimizer. {error}"
        ) from error


def blocks_of(state: Any) -> dict[str, set[str]]:
    """{parameter: the names of its blocks}."""
    found: dict[str, set[str]] = {}
    for _, node in walk(state):
        if isinstance(node, BlockedState):
            for rows in block_names(node.layout).values():
                for parameter, block in rows.values():
                    found.setdefault(parameter, set()).add(block)
    return found


def gradient_of(p: Tensor) -> Tensor | None:
    """None where a frozen parameter still has an old gradient."""
    return p.grad if p.requires_grad else None
