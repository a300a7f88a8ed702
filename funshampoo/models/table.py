"""What every parameter gets, and what it costs: a table, and a warning where the cost is high."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.placed import any_in_parts
from funshampoo.core.text import aligned, plural, readable
from funshampoo.optim import Optimizer
from funshampoo.optim.planned import planned
from funshampoo.optim.ready import blocks_of
from funshampoo.recipes import ELEMENTWISE
from funshampoo.state.memory import summary


class Row(NamedTuple):
    """One parameter.

    Attributes:
        role: the role that `for_model` found; "" in an optimizer made in another way. method, lr:
        those of its group. blocks: the number of blocks it is cut into; 0 if the method has none.
        state_bytes: bytes of its own state, without what is shared; 0 while it is frozen.
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
    """Rows in the order of the groups; `print(table)` displays them.

    Attributes:
        sharded: parameters are DTensors, of which every rank holds a part: the bytes of their state
            are those of all ranks together.
    """

    rows: tuple[Row, ...]
    sharded: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of state of all parameters."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "role", "method", "lr", "blocks", "state")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) or "()"
            size = "frozen" if row.frozen else readable(row.state_bytes)
            words = row.name, shape, row.role, row.method
            lines.append((*words, _rate(row.lr), str(row.blocks or "-"), size))
        where = " on all ranks together" if self.sharded else ""
        size = f"{readable(self.state_bytes)} of state{where}"
        total = f"{plural(len(self.rows), 'parameter')}, {size}."
        return "\n".join([*aligned(lines, left=range(4)), total])


def routing_table(optimizer: Optimizer) -> RoutingTable:
    """Name, shape, role, method, learning rate, blocks and bytes of state of every parameter.

    It allocates nothing and needs no step. With sharded blocks, the bytes are this rank's; those of
    sharded parameters (FSDP2, tensor parallelism) are all ranks' together, and
    `python -m funshampoo.plan --sharding ...` shows what each rank holds.

    Args:
        optimizer: from `for_model`, or any `funshampoo.Optimizer`, which has no roles.

    Raises:
        TypeError: not a `funshampoo.Optimizer`.

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
        raise TypeError(
            f"a {type(optimizer).__name__} is no funshampoo.Optimizer: give what for_model(...) or "
            "funshampoo.Optimizer(...) made; of a model alone, funshampoo.roles(model) tells."
        )
    rows, sharded = [], False
    for group, parameters, method, state in planned(optimizer):
        sharded |= any_in_parts(parameters.values())
        of_group = str(group.get("role", "")), method, group.get("lr")
        sizes, blocks = summary(state, file=io.StringIO()).parameters, blocks_of(state)
        for name, p in parameters.items():
            own = len(blocks.get(name, ())), sizes.get(name, 0), not p.requires_grad
            rows.append(Row(name, tuple(p.shape), *of_group, *own))
    return RoutingTable(tuple(rows), sharded)


def _rate(lr: Any) -> str:
    if isinstance(lr, Tensor):
        return "a tensor" if lr.device.type != "cpu" else f"{lr.item():.4g}"
    return f"{lr:.4g}" if isinstance(lr, float | int) else "-"


_MANY_ROWS = 8192
"""A step sees few rows of a larger table, a vocabulary: their factor matrix is mostly noise."""
_TIMES_ADAMW = 8
_LARGE = 64 * 2**20
"""Bytes of a parameter's state up to which there is no warning."""


def warn_of_costs(optimizer: Optimizer) -> None:
    """Warn once for each kind of reason, naming the parameters and the remedy.

    In the name of the caller's caller.
    """
    rows = routing_table(optimizer).rows
    tables = [row for row in rows if _is_large_table(row)]
    if tables:
        first = tables[0]
        warnings.warn(
            f"{_named(tables)}, {first.role} of shape {first.shape}, gets {first.method}: "
            f"{readable(first.state_bytes)} of state in {plural(first.blocks, 'block')}, and the "
            "products that go with them, where most rows have no gradient in a step. AdamW is "
            "likely to be as good: leave the role out of method_roles, or the override away.",
            stacklevel=3,
        )
    large = [row for row in rows if row not in tables and _is_out_of_proportion(row)]
    if large:
        first = max(large, key=lambda row: row.state_bytes)
        warnings.warn(
            f"{_named(large)}: {first.method} keeps {readable(first.state_bytes)} for "
            f"'{first.name}' of shape {first.shape}, {_ratio(first):.0f} times AdamW's state: "
            "smaller blocks (max_size) need less, and "
            f"overrides={{'{first.name}': 'vector'}} leaves it to AdamW.",
            stacklevel=3,
        )


def _is_large_table(row: Row) -> bool:
    table = row.role in ("embedding", "head") and max(row.shape, default=0) > _MANY_ROWS
    return table and row.method not in ELEMENTWISE and row.blocks > 0


def _is_out_of_proportion(row: Row) -> bool:
    return row.state_bytes > _LARGE and _ratio(row) > _TIMES_ADAMW


def _ratio(row: Row) -> float:
    """Bytes of state relative to AdamW's, two numbers of four bytes per entry."""
    return row.state_bytes / (8 * max(math.prod(row.shape), 1))


def _named(rows: list[Row]) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"'{rows[0].name}'{more}"
