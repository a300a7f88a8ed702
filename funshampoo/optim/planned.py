"""The state that an optimizer is going to have, without its memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from funshampoo.optim.optimizer import Optimizer
from funshampoo.optim.vocabulary import Vocabulary


class Planned(NamedTuple):
    """Of one parameter group.

    Attributes:
        parameters: {name: parameter}, of all that have a shape, frozen ones too.
        method: what the group's method is called.
        state: its chain's state, in meta tensors, of those that are trained.
    """

    group: dict[str, Any]
    parameters: dict[str, Tensor]
    method: str
    state: Any


def planned(optimizer: Optimizer) -> list[Planned]:
    """What the groups of an optimizer have, or will have at the next step; nothing is allocated.

    Raises:
        TypeError, ValueError: an entry of a group is missing or out of range.
    """
    found = []
    first = 0
    for group in optimizer.param_groups:
        method = group.get("method", optimizer._method)
        names = group.get("param_names")
        if names is None:
            names = [f"param_{first + i}" for i in range(len(group["params"]))]
        first += len(group["params"])
        parameters = {n: p for n, p in zip(names, group["params"]) if not is_lazy(p)}
        words = Vocabulary(method)
        tx = words.build(words.arguments(group))
        on_meta = {
            name: torch.empty(p.shape, dtype=p.dtype, device="meta")
            for name, p in parameters.items()
            if p.requires_grad
        }
        called = getattr(method, "__name__", None) or getattr(method, "name", None) or "a chain"
        found.append(Planned(group, parameters, str(called), tx.init(on_meta)))
    return found
