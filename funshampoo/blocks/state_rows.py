"""Rows of a state: taken out for a portion of a step, and put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.portions import Portion
from funshampoo.core.tree import flatten
from funshampoo.state.places import Place, map_tensors


class Part(NamedTuple):
    """A portion's part of a state: its leaves, by their indices in the whole state."""

    structure: Any
    indices: list[int]
    rows: list[range | None]  # None: not a tensor by rows


class StateRows:
    """How the tensors of a state follow the rows of its stacks, for the most recent structures.

    A tensor has its stack's rows as leading axis, or is 0-dimensional and shared by all.

    Args:
        rows: how many there are, in all stacks.
    """

    def __init__(self, rows: int) -> None:
        # Tiles have at least two rows: this holds those of plain steps and those of refreshes.
        self._most = max(256, rows)
        self._known: dict[Any, Part] = {}

    def part(self, state: Any, portion: Portion, stacks: Collection[str]) -> tuple[Any, Part]:
        """(the state of these rows, which leaves it has). Tensors with rows are views.

        Args:
            stacks: the names of all that the state has.
        """
        leaves, structure = flatten(state)
        if torch.compiler.is_dynamo_compiling():
            return self._cut(leaves, self._found(state, structure, len(leaves), portion, stacks))
        key = structure, tuple([(stack, rows.start, rows.stop) for stack, rows in portion.items()])
        if key not in self._known:
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = self._found(state, structure, len(leaves), portion, stacks)
        return self._cut(leaves, self._known[key])

    def _cut(self, leaves: list[Any], part: Part) -> tuple[Any, Part]:
        cut = [_cut(leaves[k], rows) for k, rows in zip(part.indices, part.rows)]
        return part.structure.unflatten(cut), part

    def _found(
        self, state: Any, structure: Any, count: int, portion: Portion, stacks: Collection[str]
    ) -> Part:
        rows: dict[int, range] = {}

        def note(place: Place, x: Tensor, index: int) -> int:
            if place.stack is not None and x.ndim > 0:
                rows[index] = portion[place.stack]
            return index

        numbered = structure.unflatten(range(count))
        mine = map_tensors(note, state, numbered, stacks=stacks, only=portion)
        indices, part = flatten(mine)
        return Part(part, indices, [rows.get(k) for k in indices])


def store(state: Any, part: Part, new: Any, shared: dict[int, Tensor]) -> None:
    """Write the rows of a part into the state's own memory.

    Args:
        shared: collects shared entries, by index: later portions start from the old values.

    Raises:
        ValueError: a stage changed the structure of its state, or a shape or dtype in it.
    """
    leaves, _ = flatten(state)
    for k, rows, x in zip(part.indices, part.rows, _checked(part, new)):
        if rows is None:
            shared[k] = x
        else:
            _write(_cut(leaves[k], rows), x)


def store_shared(state: Any, shared: Mapping[int, Tensor]) -> None:
    """Write the shared entries, after the last portion."""
    leaves, _ = flatten(state)
    for k, x in shared.items():
        _write(leaves[k], x)


def joined(state: Any, parts: Sequence[tuple[Part, Any]]) -> Any:
    """The state with new parts in place of the old ones, as new tensors.

    Raises:
        ValueError: a stage changed the structure of its state.
    """
    leaves, structure = flatten(state)
    pieces: dict[int, list[tuple[range, Tensor]]] = {}
    results = list(leaves)
    for part, new in parts:
        for k, rows, x in zip(part.indices, part.rows, _checked(part, new)):
            if rows is None:
                results[k] = x
            else:
                pieces.setdefault(k, []).append((rows, x))
    for k, found in pieces.items():
        results[k] = filled(leaves[k], found)
    return structure.unflatten(results)


def _checked(part: Part, new: Any) -> list[Tensor]:
    leaves, structure = flatten(new)
    if structure != part.structure:
        raise ValueError("a stage changed the structure of its state.")
    return leaves


def filled(old: Tensor, new: Sequence[tuple[range, Tensor]]) -> Tensor:
    """A tensor with new rows, and its old ones in between."""
    parts, at = [], 0
    for rows, x in sorted(new, key=lambda piece: piece[0].start):
        if rows.start > at:
            parts.append(old.narrow(0, at, rows.start - at))
        parts.append(x)
        at = rows.stop
    if at < old.shape[0]:
        parts.append(old.narrow(0, at, old.shape[0] - at))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _cut(x: Tensor, rows: range | None) -> Tensor:
    # Shared entries are copied: a portion may write to one, and the next starts from the same.
    return x.clone() if rows is None else rows_of_tensor(x, rows)


def rows_of_tensor(x: Tensor, rows: range) -> Tensor:
    """Some rows: a view, or x itself if they are all of it."""
    return x if len(rows) == x.shape[0] else x.narrow(0, rows.start, len(rows))


def _write(old: Tensor, new: Tensor) -> None:
    """Write new values over the old ones, unless a stage has done so itself."""
    if new is old or (new.data_ptr() == old.data_ptr() and new.stride() == old.stride()):
        return
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"a stage turned a tensor of its state from {old.dtype} {tuple(old.shape)} to "
            f"{new.dtype} {tuple(new.shape)} on a donated step."
        )
    old.copy_(new)
