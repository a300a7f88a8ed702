"""Which parameter gets what, and what it costs: a table for people."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.text import aligned, plural, readable
from funshampoo.optim import Optimizer
from funshampoo.optim.planned import planned
from funshampoo.optim.ready import blocks_of
from funshampoo.state.memory import summary


class Row(NamedTuple):
    """One parameter.

    Attributes:
        role: what `for_model` found it to be; "" in an optimizer made in another way.
        method, lr: of its group.
        blocks: in how many it is cut; 0 where the method has none.
        state_bytes: of its own state, without what is shared; 0 while it is frozen.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    method: str
    lr: Any
    blocks: int
    state_bytes: int
    frozen: bool


class RoutingTable(NamedTuple):
    """Rows in the order of the groups; `print` shows them."""

    rows: tuple[Row, ...]

    @property
    def state_bytes(self) -> int:
        """Of all parameters."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "role", "method", "lr", "blocks", "state")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) or "()"
            size = "frozen" if row.frozen else readable(row.state_bytes)
            words = row.name, shape, row.role, row.method
            lines.append((*words, _rate(row.lr), str(row.blocks or "-"), size))
        total = f"{plural(len(self.rows), 'parameter')}, {readable(self.state_bytes)} of state."
        return "\n".join([*aligned(lines, left=range(4)), total])


def routing_table(optimizer: Optimizer) -> RoutingTable:
    """Name, shape, role, method, rate, blocks and bytes of state of every parameter.

    Nothing is allocated and no step is needed. Where blocks are sharded, the bytes are this rank's.

    Args:
        optimizer: of `for_model`, or any `funshampoo.Optimizer`, which knows of no roles.

    Raises:
        TypeError: another optimizer.

    >>> import torch, funshampoo
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(routing_table(funshampoo.for_model(model, "muon", lr=0.02)))
    parameter  shape  role    method     lr  blocks  state
    0.weight   8×8    matrix  muon     0.02       1  276 B
    2.weight   2×8    head    adamw   0.001       -  152 B
    0.bias     8      vector  adamw   0.001       -   88 B
    2.bias     2      vector  adamw   0.001       -   40 B
    4 parameters, 556 B of state.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"a {type(optimizer).__name__} is no funshampoo.Optimizer.")
    rows = []
    for group, parameters, method, state in planned(optimizer):
        of_group = str(group.get("role", "")), method, group.get("lr")
        sizes, blocks = summary(state, file=io.StringIO()).parameters, blocks_of(state)
        for name, p in parameters.items():
            own = len(blocks.get(name, ())), sizes.get(name, 0), not p.requires_grad
            rows.append(Row(name, tuple(p.shape), *of_group, *own))
    return RoutingTable(tuple(rows))


def _rate(lr: Any) -> str:
    if isinstance(lr, Tensor):
        return "a tensor" if lr.device.type != "cpu" else f"{lr.item():.4g}"
    return f"{lr:.4g}" if isinstance(lr, float | int) else "-"
