"""What is said of choices that cost more than they are likely to bring."""

from __future__ import annotations

import math
import warnings

from funshampoo.core.text import plural, readable
from funshampoo.models.table import Row, routing_table
from funshampoo.optim import Optimizer
from funshampoo.recipes import ELEMENTWISE

_MANY_ROWS = 8192
"""Of a table with more rows, a vocabulary, a step sees few: a factor of them is mostly noise."""
_TIMES_ADAMW = 8
_LARGE = 64 * 2**20
"""Bytes of a parameter's state below which nobody minds."""


def warn_of_costs(optimizer: Optimizer, stacklevel: int) -> None:
    """Warn, once for each kind of reason, with the parameters and the remedy."""
    rows = routing_table(optimizer).rows
    tables = [row for row in rows if _is_large_table(row)]
    if tables:
        first = tables[0]
        warnings.warn(
            f"{_named(tables)}, {first.role} of shape {first.shape}, gets {first.method}: "
            f"{readable(first.state_bytes)} of state in {plural(first.blocks, 'block')}, and the "
            "products that go with them, where most rows have no gradient in a step. AdamW is "
            "likely to be as good: leave the role out of method_roles, or the override away.",
            stacklevel=stacklevel + 1,
        )
    large = [row for row in rows if row not in tables and _is_out_of_proportion(row)]
    if large:
        first = max(large, key=lambda row: row.state_bytes)
        warnings.warn(
            f"{_named(large)}: {first.method} keeps {readable(first.state_bytes)} for "
            f"'{first.name}' of shape {first.shape}, {_ratio(first):.0f} times AdamW's state: "
            "smaller blocks (max_size) need less.",
            stacklevel=stacklevel + 1,
        )


def _is_large_table(row: Row) -> bool:
    table = row.role in ("embedding", "head") and max(row.shape, default=0) > _MANY_ROWS
    return table and row.method not in ELEMENTWISE and row.blocks > 0


def _is_out_of_proportion(row: Row) -> bool:
    return row.state_bytes > _LARGE and _ratio(row) > _TIMES_ADAMW


def _ratio(row: Row) -> float:
    """Against two numbers of four bytes an entry."""
    return row.state_bytes / (8 * max(math.prod(row.shape), 1))


def _named(rows: list[Row]) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"'{rows[0].name}'{more}"
