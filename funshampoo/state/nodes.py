"""The nodes of a state: to find one, to walk over all, to tell a state from something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from funshampoo.core.interrupted import check_whole, tensors_of

StateT = TypeVar("StateT")


def find_state(states: Any, kind: type[StateT] | tuple[type[StateT], ...]) -> StateT | None:
    """The last state of this kind in a (nested) state, or None; of one in another, the outer.

    >>> import torch
    >>> from funshampoo.state import ScheduleState
    >>> find_state({"a": {"b": ScheduleState(torch.tensor(3))}}, ScheduleState)
    ScheduleState(steps=tensor(3))
    """
    nodes: list[Any] = [states]
    while nodes:  # from the last: mostly it is one of the stages that stand just before
        node = nodes.pop()
        if isinstance(node, kind):
            return node
        if isinstance(node, dict):
            nodes.extend(node.values())
        elif isinstance(node, (tuple, list)):
            nodes.extend(node)
    return None


def first_state(
    states: Any, kind: type[StateT] | tuple[type[StateT], ...], closed: type | tuple[type, ...] = ()
) -> StateT | None:
    """The first state of this kind in a (nested) state, or None; of one in another, the outer.

    Args:
        states: in the order of the chain.
        kind: of the state.
        closed: kinds of states that are not looked into.
    """
    nodes: list[Any] = [states]
    while nodes:
        node = nodes.pop()
        if isinstance(node, kind):
            return node
        if isinstance(node, dict):
            nodes.extend([*node.values()][::-1])
        elif isinstance(node, (tuple, list)) and not isinstance(node, closed):
            nodes.extend(node[::-1])
    return None


def parted(previous: tuple[Any, ...], own: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(states of the stages before the one whose state is `own`, of those after it).

    Args:
        previous: of the context: of a chain in another one both are there, the inner stages last.
        own: may be part of one of them, as of a combinator's. It is known by its last tensor:
            `masked` makes other tuples of the same tensors. (all, all backwards) where it is not
            found, or has none.

    >>> import torch
    >>> one, own, other = [(torch.zeros(()),) for _ in range(3)]
    >>> before, after = parted((one, {"inner": own}, other), own)
    >>> before == (one,), after == (other,)
    (True, True)
    """
    for i, state in enumerate(previous):
        before, rest = previous[:i], previous[i + 1 :]
        if state is own:
            return before, rest
        if _holds(state, own):  # it is a chain's perhaps, whose stages are among those that follow
            inside = [_holds(state, x) for x in rest]
            near = parted(tuple([x for x, within in zip(rest, inside) if within]), own)
            others = [x for x, within in zip(rest, inside) if not within]
            return (*before, *near[0]), (*near[1], *others)
    return previous, previous[::-1]


_HOLD_STATES = ("inner", "direction", "onto")


def _holds(state: Any, part: Any) -> bool:
    """Whether one state is the other, or has it in it. Asked on every step."""
    nodes: list[Any] = [state]
    while nodes:  # where combinators keep states: few, beside their tensors
        node = nodes.pop()
        if node is part:
            return True
        if isinstance(node, dict):
            nodes.extend(node.values())
        else:
            fields = getattr(type(node), "_fields", ())
            nodes.extend([getattr(node, name) for name in _HOLD_STATES if name in fields])
    fields = getattr(type(state), "_fields", _HOLD_STATES)
    if type(state) is not type(part) and set(_HOLD_STATES).isdisjoint(fields):
        return False
    known = find_state(part, Tensor)
    return known is not None and any([x is known for x in tensors_of(state)])


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
    """Raise where it can't be read as the state of a chain.

    Raises:
        TypeError: see `check_kind`.
        InterruptedStepError: it is half done.
    """
    check_kind(state)
    check_whole(state)


def check_kind(state: Any) -> None:
    """Raise where this is no state, but for a half done one, into which a checkpoint may be loaded.

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
