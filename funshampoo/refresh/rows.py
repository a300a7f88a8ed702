"""Some rows of a stack: read, and written back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from funshampoo.core.modes import row_index

Rows = Sequence[int] | None
"""Rows of a stack; None: all, or the one matrix of a leaf."""


def taken(x: Tensor, rows: Rows) -> Tensor:
    """Rows of a tensor: a view where they follow each other; what has no rows as it is."""
    if rows is None or x.ndim == 0:
        return x
    if isinstance(rows, range):
        return x.narrow(0, rows.start, len(rows))
    return x.index_select(0, row_index(tuple(rows), x.device))


def written(x: Tensor, new: Tensor, rows: Rows, donate: bool) -> Tensor:
    """x with new values in these rows; in its own memory where that is donated.

    Not where a derivative is wanted, which may need the old values.
    """
    if not donate or x.requires_grad or new.requires_grad:
        return new if rows is None else x.index_copy(0, row_index(tuple(rows), x.device), new)
    if rows is None or isinstance(rows, range):
        taken(x, rows).copy_(new)
    else:
        x.index_copy_(0, row_index(tuple(rows), x.device), new)
    return x
