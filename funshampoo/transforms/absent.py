"""Parameters without a gradient: what of a state is theirs, and keeps its values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.host import row_index
from funshampoo.state.places import Path, Place, map_tensors
from funshampoo.state.stages import BlockedState
from funshampoo.transforms.layout import Layout


def absent_rows(layout: Layout, parameters: list[int]) -> dict[str, set[int]]:
    """{stack: the rows that belong to these parameters}."""
    rows: dict[str, set[int]] = {}
    for i in parameters:
        for region in layout.parameters[i].regions:
            span = range(region.first, region.first + region.rows)
            rows.setdefault(region.stack, set()).update(span)
    return rows


Kept = dict[tuple[Path, str | None], tuple[Tensor, Tensor]]  # {place: (rows, their values)}


def saved_rows(state: BlockedState, layout: Layout, missing: list[int]) -> Kept:
    """Copies of the rows of parameters without a gradient, from every per-block tensor."""
    wanted = absent_rows(layout, missing)
    kept: Kept = {}

    def save(place: Place, x: Tensor) -> Tensor:
        if place.stack in wanted and x.ndim > 0:
            held = enumerate(place.rows or ())
            rows = [i for i, row in held if row in wanted[place.stack]]
            index = row_index(tuple(rows), x.device)
            kept[place.path, place.stack] = index, x.index_select(0, index)
        return x

    map_tensors(save, state)
    return kept


def restored_rows(state: BlockedState, kept: Kept) -> Any:
    """The inner state with the saved rows put back."""

    def restore(place: Place, x: Tensor) -> Tensor:
        found = kept.get((place.path, place.stack))
        return x if found is None else x.index_copy(0, *found)

    return map_tensors(restore, state).inner
