"""The nodes of a state: find one, walk over all, tell a state from other objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from funshampoo.core.interrupted import check_whole

StateT = TypeVar("StateT")


def find_state(
    states: Any,
    kind: type[StateT] | tuple[type[StateT], ...],
    closed: type | tuple[type, ...] = (),
    *,
    first: bool = False,
) -> StateT | None:
    """The last state of this kind in a (nested) state, or None; of nested ones, the outer.

    Args:
        states: in the order of the chain.
        kind: the state's class.
        closed: kinds of states not to search in.
        first: the first one in place of the last.

    >>> import torch
    >>> from funshampoo.state import ScheduleState
    >>> find_state({"a": {"b": ScheduleState(torch.tensor(3))}}, ScheduleState)
    ScheduleState(steps=tensor(3))
    """
    nodes: list[Any] = [states]
    while nodes:  # from the last: usually it is a stage just before
        node = nodes.pop()
        if isinstance(node, kind):
            return node
        if isinstance(node, dict):
            nodes.extend([*node.values()][::-1] if first else node.values())
        elif isinstance(node, (tuple, list)) and not isinstance(node, closed):
            nodes.extend([*node][::-1] if first else node)
    return None


def first_state(
    states: Any, kind: type[StateT] | tuple[type[StateT], ...], closed: type | tuple[type, ...] = ()
) -> StateT | None:
    """The first state of this kind in a (nested) state, or None; of nested ones, the outer.

    Args:
        states: in the order of the chain.
        kind: the state's class.
        closed: kinds of states not to search in.
    """
    return find_state(states, kind, closed, first=True)


def walk(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node of a state with its path, parents first, in the order of the chain."""
    yield path, node
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, tuple):
        names = getattr(node, "_fields", range(len(node)))
        children = list(zip(names, node))
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        return
    for key, child in children:
        yield from walk(child, (*path, str(key)))


def check_is_state(state: Any) -> None:
    """Raise if it can't be read as the state of a chain.

    Raises:
        TypeError: see `check_kind`.
        InterruptedStepError: it is half done.
    """
    check_kind(state)
    check_whole(state)


def check_kind(state: Any) -> None:
    """Raise if this is not a state. A half done one passes: a checkpoint may be loaded into it.

    Raises:
        TypeError: it is a torch.optim.Optimizer, its `state` or its `state_dict()`, or anything
            else that no `init` returns.
    """
    if isinstance(state, Mapping) and any(isinstance(key, Tensor) for key in state):
        raise TypeError(
            "these are the tensors of an optimizer by parameter. The state of its chain, one for "
            "every parameter group, is in optimizer.chain_states()."
        )
    saved = isinstance(state, Mapping) and "param_groups" in state
    if saved or not isinstance(state, (Mapping, tuple, list, Tensor)):
        what = "the state_dict of an optimizer" if saved else f"of type {type(state).__name__}"
        raise TypeError(
            f"this is {what}, and no state. Give what tx.init(params) or tx.update(...) returned; "
            "of an optimizer, one of optimizer.chain_states()."
        )
