"""A state for a parameter group, with the parameters that it was made for."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.modes import for_keeps
from funshampoo.core.parameters import detached, problem_of_gradients
from funshampoo.optim.building import Built
from funshampoo.state.nodes import walk
from funshampoo.state.stages import LearningRateState

ByParameter = dict[Tensor, dict[str, Tensor]]  # without what is shared
Look = tuple[Any, ...]


class Left(NamedTuple):
    """What is remembered of a parameter that is in no group, or not yet in its new one."""

    entries: dict[str, Tensor]
    shared: dict[str, Tensor]


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

    def check_gradients(self) -> None:
        """Raise if there is one that can't be stepped on.

        Raises:
            RuntimeError: a sparse one.
        """
        parameters = [k.parameter for k in self.known]
        if problem := problem_of_gradients([p.grad for p in parameters], parameters):
            raise RuntimeError(f"the gradient of '{self.known[problem[0]].name}' {problem[1]}.")


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
        _check_scaled_once(built, state)
    return state


def _check_scaled_once(built: Built, state: Any) -> None:
    """The updates of a method that takes no rate are multiplied by one, here or in the method."""
    rates = sum(isinstance(node, LearningRateState) for _, node in walk(state))
    if "lr" not in built.arguments and not rates:
        raise TypeError(
            "the method takes no learning rate, and nothing in it scales by one: its updates would "
            "be added as they are, uphill if they are gradients. Give lr=; or lr=None if it scales "
            "them by a negative number in another way than by scale_by_learning_rate."
        )
    if built.arguments.get("lr") is not None and rates > 1:
        raise TypeError(
            "the transformation scales by a learning rate already, and lr= would do it again: give "
            "it without scale_by_learning_rate, or give its recipe."
        )


def gradient_of(p: Tensor, ascends: bool) -> Tensor | None:
    """None where a frozen parameter still has an old gradient."""
    g = p.grad if p.requires_grad else None
    return -g if ascends and g is not None else g
