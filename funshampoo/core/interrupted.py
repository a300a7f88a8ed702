"""Interrupted steps: a step that consumes its state but does not finish leaves it half done.

The state is marked, so that it is not stepped, saved or read unknowingly: some of its tensors may
belong to the new step while its counters show the old one, and parameters may have moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.placed import parts_among

_MARK = "_funshampoo_half_done"


class InterruptedStepError(RuntimeError):
    """A state is half done: an exception, perhaps Ctrl-C, ended a step that was writing to it."""


class Watched:
    """A context that marks the state if an exception leaves it after a write.

    Writes are detected by the tensors' version counters, for DTensors also those of this rank's
    parts, to which updates are added. Inference tensors have none, and count as written to.
    A state without tensors, such as plain SGD's, can't be marked.

    Args:
        state: consumed in the block.
        params: detached ones, written to in it.

    Attributes:
        state: its tensors.

    Raises:
        InterruptedStepError: the state is already half done.
    """

    def __init__(self, state: Any, params: Any = ()) -> None:
        self.state = tensors_of(state)
        self._tensors = self.state + tensors_of(params)

    def begin(self) -> Watched:
        """Start watching. Called by `with`, and by callers that mark the state themselves."""
        check_unmarked(self.state[0] if self.state else None)
        self._before = _versions(self._tensors)
        return self

    def was_written(self) -> bool:
        """Whether anything has been written to since."""
        return self._before is None or _versions(self._tensors) != self._before

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and self.was_written():
            mark(self.state)


def mark(state: Any) -> None:
    """Mark a state as half done."""
    for x in tensors_of(state):
        setattr(x, _MARK, True)


def check_whole(state: Any) -> None:
    """Raise if a step of this state was interrupted.

    Raises:
        InterruptedStepError: one was.
    """
    if not torch.compiler.is_dynamo_compiling():
        check_unmarked(next(iter(tensors_of(state, 1)), None))


def check_unmarked(first: Tensor | None) -> None:
    """`check_whole` for a state whose first tensor this is.

    Raises:
        InterruptedStepError: a step was interrupted.
    """
    if getattr(first, _MARK, False):  # a state has all its tensors marked, or none
        raise InterruptedStepError(
            "a step was interrupted while it was writing to this state, which is half done: some "
            "of it, and some parameters, belong to the new step, some to the old. Go on from a "
            "checkpoint of parameters and state; or keep the parameters as they are and start "
            "with a fresh state: tx.init(params), or optimizer.state.clear()."
        )


def tensors_of(state: Any, most: int | None = None) -> list[Tensor]:
    """The tensors of a state, always in the same order; at most the first `most`.

    Several times faster than `flatten`, which also searches layouts.
    """
    found: list[Tensor] = []
    nodes: list[Any] = [(state,)]
    for node in nodes:  # it grows meanwhile: level by level, so that a clock comes first
        if isinstance(node, dict):
            node = node.values()
        elif hasattr(node, "layout"):
            node = node._replace(layout=())
        for child in node:  # a type is compared in a third of the time of isinstance(_, Tensor)
            if type(child) is Tensor:
                found.append(child)
            elif isinstance(child, (dict, tuple, list)):
                nodes.append(child)
            elif isinstance(child, Tensor):
                found.append(child)
        if most is not None and len(found) >= most:
            break
    return found[:most]


def _versions(tensors: list[Tensor]) -> list[int] | None:
    try:
        return [x._version for x in [*tensors, *parts_among(tensors)]]
    except RuntimeError:  # inference tensors have no version counter
        return None
