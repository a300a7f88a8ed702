"""Parameters without a gradient: what of a state is theirs, and keeps its values."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.blocks.layout import Layout
from funshampoo.core.modes import is_traced, row_index
from funshampoo.state.places import Path, Place, map_tensors
from funshampoo.state.stages import BlockedState


def absent_rows(layout: Layout, parameters: list[int]) -> dict[str, set[int]]:
    """{stack: the rows that belong to these parameters}."""
    rows: dict[str, set[int]] = {}
    for i in parameters:
        for region in layout.parameters[i].regions:
            span = range(region.first, region.first + region.rows)
            rows.setdefault(region.stack, set()).update(span)
    return rows


class _Saved(NamedTuple):
    """Rows of a tensor of the state, and their values."""

    rows: Tensor
    values: Tensor
    whole: Tensor
    version: int


Kept = dict[tuple[Path, str | None], _Saved]


def saved_rows(state: BlockedState, layout: Layout, missing: list[int]) -> Kept:
    """Copies of the rows of parameters without a gradient, from every per-block tensor."""
    wanted = absent_rows(layout, missing)
    kept: Kept = {}

    def save(place: Place, x: Tensor) -> Tensor:
        if place.stack in wanted and x.ndim > 0:
            held = enumerate(place.rows or ())
            rows = [i for i, row in held if row in wanted[place.stack]]
            index = row_index(tuple(rows), x.device)
            values = x.index_select(0, index)
            kept[place.path, place.stack] = _Saved(index, values, x, _version(x))
        return x

    map_tensors(save, state)
    return kept


def restored_rows(state: BlockedState, kept: Kept) -> Any:
    """The inner state with the saved rows put back, where the step has changed anything."""

    def restore(place: Place, x: Tensor) -> Tensor:
        found = kept.get((place.path, place.stack))
        if found is None or (x is found.whole and 0 <= found.version == _version(x)):
            return x
        return x.index_copy(0, found.rows, found.values)

    return map_tensors(restore, state).inner


def _version(x: Tensor) -> int:
    """How often it was written to; -1 where nobody counts."""
    return -1 if is_traced() or x.is_inference() else x._version
