"""A state for a parameter group, fresh or carried over, with the parameters it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.clock import read_counter
from funshampoo.core.interrupted import tensors_of
from funshampoo.core.modes import for_keeps
from funshampoo.core.parameters import detached
from funshampoo.distributed.gathering import gathered
from funshampoo.optim.building import Built
from funshampoo.optim.entries import split_shared
from funshampoo.optim.vocabulary import SCALED_TWICE
from funshampoo.state.checkpoint import carried_over
from funshampoo.state.nodes import walk
from funshampoo.state.parts import part_of
from funshampoo.state.places import block_names
from funshampoo.state.stages import BlockedState, LearningRateState

ByParameter = dict[Tensor, dict[str, Tensor]]  # without shared entries
Unattached = dict[Tensor, dict[str, Tensor]]  # of parameters in no state, with shared entries
Snapshot = tuple[Any, ...]


class Known(NamedTuple):
    """A parameter with its properties at the time the state was made for it."""

    name: str
    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class Plan(NamedTuple):
    """The chain and parameters of a group's next step; nothing has been made for it yet.

    Attributes:
        known: the run's own list if its state can be continued as it is.
        snapshot: the group's `snapshot`.
        fresh_parameters: the parameters that start from nothing.
    """

    built: Built
    known: list[Known]
    snapshot: Snapshot
    fresh_parameters: Set[Tensor] = frozenset()


class Ready(NamedTuple):
    """A state for a group, with the chain and the parameters that it belongs to.

    Attributes:
        snapshot: the group's `snapshot` when the state was made.
        fresh: whether the state is just what `init` made from the parameters of that time.
    """

    built: Built
    known: list[Known]
    state: Any
    snapshot: Snapshot = ()
    fresh: bool = False


def same_parameters(a: list[Known], b: list[Known]) -> bool:
    """Whether a state for one list of parameters is also a state for the other."""
    return len(a) == len(b) and all(
        x.parameter is y.parameter and x.name == y.name and x[2:] == y[2:] for x, y in zip(a, b)
    )


def initial_state(built: Built, known: list[Known]) -> Any:
    """A state that can be stepped, whatever mode the caller is in."""
    assert built.transformation is not None
    with for_keeps():
        state = built.transformation.init({k.name: detached(k.parameter) for k in known})
    if not built.vocabulary.takes_rate:
        _check_scaled_once(built, state)
    return state


def _check_scaled_once(built: Built, state: Any) -> None:
    """Check that exactly one learning rate scales the updates of a method that takes none."""
    rates = sum(isinstance(node, LearningRateState) for _, node in walk(state))
    if "lr" not in built.arguments and not rates:
        raise TypeError(
            "the method takes no learning rate, and nothing in it scales by one: its updates would "
            "be added as they are, uphill if they are gradients. Give lr=; or lr=None if it scales "
            "them by a negative number in another way than by scale_by_learning_rate."
        )
    if built.arguments.get("lr") is not None and rates > 1:
        raise TypeError(SCALED_TWICE)


def is_initial(loaded: Any, made: Any) -> bool:
    """Whether a loaded state equals what `init` makes, so that it need not be kept.

    False for a state shared by ranks, which would have to agree on it.
    """
    if part_of(made).size > 1:
        return False
    pairs = zip(tensors_of(loaded), tensors_of(made))  # up to the first that differs: the clock
    return all(not x.is_meta and torch.equal(x, y) for x, y in pairs)


def state_with_entries(
    built: Built,
    known: list[Known],
    mine: ByParameter,
    shared: Mapping[str, Tensor],
    unattached: Unattached,
) -> Any:
    """A state for these parameters as they are now, with the remembered entries in it.

    Args:
        built: the chain that the state is for.
        known: the parameters as they are now.
        mine, shared: the group's entries, see `GroupRun.entries`. If it has made no step, it
            continues from the counters that the first parameter with any brings.
        unattached: entries of parameters that come from elsewhere.

    Raises:
        ValueError: the entries belong to other blocks, or have other shapes.
    """
    flat: dict[str, Tensor] = {}
    try:
        state = initial_state(built, known)
        blocks = blocks_of(state)
        for k in known:
            entries = mine.get(k.parameter, {})
            if k.parameter in unattached:
                entries, others = split_shared(unattached[k.parameter])
                shared = (others or shared) if _has_not_begun(shared) else shared
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


def _has_not_begun(shared: Mapping[str, Tensor]) -> bool:
    """Whether these are of no step, as in a new group that a client has written to."""
    counters = [x for name, x in shared.items() if name.rpartition("/")[2] == "steps"]
    return not shared or (bool(counters) and not any(map(read_counter, counters)))


def blocks_of(state: Any) -> dict[str, set[str]]:
    """{parameter: the names of its blocks}."""
    found: dict[str, set[str]] = {}
    for _, node in walk(state):
        if isinstance(node, BlockedState):
            for rows in block_names(node.layout).values():
                for parameter, block in rows.values():
                    found.setdefault(parameter, set()).add(block)
    return found
