"""The state that an optimizer is going to have, without its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from funshampoo.optim.optimizer import Optimizer


class Planned(NamedTuple):
    """The planned state of one parameter group.

    Attributes:
        parameters: {name: parameter} of all that have a shape, including frozen ones.
        method: the name of the group's method.
        state: its chain's state for the trained parameters, in meta tensors.
    """

    group: dict[str, Any]
    parameters: dict[str, Tensor]
    method: str
    state: Any


def planned(optimizer: Optimizer) -> Iterator[Planned]:
    """What the groups of an optimizer have, or will have at the next step; nothing is allocated.

    Raises:
        TypeError, ValueError: an entry of a group is missing or out of range.
    """
    for run in optimizer._match().runs:
        group, vocabulary = run.group, run.vocabulary()
        parameters = {n: p for n, p in zip(run.names(), group["params"]) if not is_lazy(p)}
        on_meta = {
            name: torch.empty(p.shape, dtype=p.dtype, device="meta")
            for name, p in parameters.items()
            if p.requires_grad
        }
        state = vocabulary.build(vocabulary.arguments(group)).init(on_meta)
        yield Planned(group, parameters, vocabulary.method_name, state)
