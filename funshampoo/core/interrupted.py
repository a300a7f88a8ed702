"""A step that consumes its state and does not come to its end leaves a state that is half done.

It is marked, so that nobody steps, saves or reads it unawares: some of its tensors may belong to
the new step while its counters say the old one, and parameters may have moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.tree import flatten

_MARK = "_funshampoo_half_done"


class InterruptedStepError(RuntimeError):
    """A state is half done: an exception, Ctrl-C perhaps, ended a step that was writing to it."""


@contextmanager
def watched(state: Any, params: Any) -> Iterator[None]:
    """Mark the state if an exception leaves this block after something was written to.

    Whether something was is told by the version counters of the tensors. A tensor of inference mode
    has none, and counts as written to.

    Raises:
        InterruptedStepError: the state is half done already.
    """
    tensors = _tensors(state)
    _check(tensors)
    tensors_and_params = tensors + _tensors(params)
    before = _versions(tensors_and_params)
    try:
        yield
    except BaseException:
        if before is None or _versions(tensors_and_params) != before:
            for x in tensors:
                setattr(x, _MARK, True)
        raise


def check_whole(state: Any) -> None:
    """Raise if a step of this state was interrupted.

    Raises:
        InterruptedStepError: one was.
    """
    if not torch.compiler.is_dynamo_compiling():
        _check(_tensors(state))


def _check(tensors: list[Tensor]) -> None:
    if tensors and getattr(tensors[0], _MARK, False):  # all of a state's are marked, or none
        raise InterruptedStepError(
            "a step was interrupted while it was writing to this state, which is half done: some "
            "of it, and some parameters, belong to the new step, some to the old. Go on from a "
            "checkpoint of parameters and state; or keep the parameters as they are and start "
            "with a fresh state: tx.init(params), or optimizer.state.clear()."
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in flatten(tree)[0] if isinstance(x, Tensor)]


def _versions(tensors: list[Tensor]) -> list[int] | None:
    try:
        return [x._version for x in tensors]
    except RuntimeError:  # of inference mode
        return None
