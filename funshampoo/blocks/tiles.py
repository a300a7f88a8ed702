"""A donated step tile by tile: some rows of some stacks at a time.

Blocks do not know of one another, so the order in which they are stepped is free. Stage after stage
on all of them, a step holds several tensors as large as the model; they don't fit into a cache, and
on a CPU new memory costs a page fault every 4 KiB, often more than the arithmetic on it. A tile
goes through all stages before the next one begins, and its numbers are those of the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funshampoo.core.modes import keep_freed_memory
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import GuardedState, ShardedState, walk

Tile: TypeAlias = dict[str, range]  # {stack: consecutive rows}
TileSize: TypeAlias = int | Literal["auto"] | None

Blocks: TypeAlias = Mapping[str, tuple[tuple[int, ...], int]]  # {stack: (block, rows)}

NUMBERS = 2**20
"""The most in a tile, for each of two kernel threads or more: 4 MiB in float32, of which a step
holds about four, so that they fit into a CPU's last cache. Up to here all is one tile."""

SHARE = 4
"""A stack that has more to do than `FLOPS` is cut into tiles of about this share of all numbers, so
that the four that a step holds are about as large as the parameters."""

NUMBERS_ELSEWHERE = 2**26
"""The most in a tile on other devices: 256 MiB in float32, so that kernels run for as long as a
hundred launches take, and a large model's step holds no copies of it."""

NUMBERS_AT_ONCE = 2**22
"""On a step that refreshes roots all is one tile up to here, and tiles are as large as `NUMBERS`
allows beyond: threads share the roots of a tile, and each tile has them wait for the last."""

FLOPS = 1e9
"""Of the products of a tile, likewise: ten milliseconds or more, beside which the fixed cost of
another tile, less than one, does not count."""


def tiles_for(
    blocks: Blocks, size: TileSize, device: torch.device, *, refresh: bool = False
) -> list[Tile]:
    """The tiles of these stacks.

    Args:
        blocks: {stack: (block, rows)}.
        device: where they are.
        size: numbers in a tile; "auto" weighs what a tile needs against what it costs on a CPU, and
            makes large ones elsewhere, where kernels wait to be launched. None for none.
        refresh: for a step that recomputes roots.
    """
    rows = {stack: count for stack, (_, count) in blocks.items()}
    numel = {stack: math.prod(block) for stack, (block, _) in blocks.items()}
    one = [{stack: range(count) for stack, count in rows.items()}]
    if size is None:
        return one
    if size == "auto" and device.type != "cpu":
        size = NUMBERS_ELSEWHERE
    if size != "auto":
        return tiles_of(rows, numel, size)
    total = sum(numel[stack] * rows[stack] for stack in rows)
    if total <= (NUMBERS_AT_ONCE if refresh else NUMBERS):
        return one
    flops = {stack: 4.0 * numel[stack] * sum(block) for stack, (block, _) in blocks.items()}
    threads = max(torch.get_num_threads(), 2)
    share = total / SHARE / threads

    def weight(stack: str) -> float:
        if refresh:
            return numel[stack] / NUMBERS
        heavy = flops[stack] * rows[stack] > threads * FLOPS
        numbers = min(NUMBERS, share) if heavy else NUMBERS
        return max(numel[stack] / numbers, flops[stack] / FLOPS)

    weights = {stack: weight(stack) for stack in rows}
    return tiles_of(rows, weights, threads, least=threads)


def tiles_of(
    rows: Mapping[str, int], weights: Mapping[str, float], most: float, least: int = 2
) -> list[Tile]:
    """Light stacks together, heavy ones in parts of `least` rows, or 4, 8, 12 and so on.

    Threads take whole matrices: seven rows keep two of them as long as eight. Products of a stack
    of a single row are shared among threads, and rounded, in another way.

    Args:
        rows: of each stack.
        weights: of a row of each stack.
        most: weight of a tile, about.
        least: rows of a part, at least 2. Roots are computed tile by tile, so with fewer rows than
            threads some would have nothing to do.

    >>> tiles_of({"4x4": 5, "4": 3, "2": 1}, {"4x4": 16, "4": 4, "2": 2}, 30)
    [{'4x4': range(0, 2)}, {'4x4': range(2, 5)}, {'4': range(0, 3), '2': range(0, 1)}]
    """
    tiles: list[Tile] = []
    light: Tile = {}
    filled = 0.0
    for stack, count in rows.items():
        weight = count * weights[stack]
        if weight > most:
            tiles += [{stack: part} for part in _parts(count, count / weight * most, least)]
            continue
        if filled + weight > most and light:
            tiles.append(light)
            light, filled = {}, 0.0
        light[stack] = range(count)
        filled += weight
    return [*tiles, light] if light else tiles


def _parts(rows: int, most: float, least: int) -> list[range]:
    """The rows in runs of about `most`; a single row that is left goes to the last.

    >>> _parts(11, 5.0, 2), _parts(9, 1.0, 2)
    ([range(0, 4), range(4, 8), range(8, 11)], [range(0, 2), range(2, 4), range(4, 6), range(6, 9)])
    """
    step = max(least, round(most / 4) * 4)
    bounds = [*range(0, max(rows - 1, 1), step), rows]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


class _Part(NamedTuple):
    """What of a state belongs to a tile: its leaves, by their indices in the whole state."""

    structure: Any
    indices: list[int]
    rows: list[range | None]  # None: not a tensor by rows


class Tiling:
    """The tiles of a set of stacks, and how states are cut along them; see `tiles_for`."""

    def __init__(
        self, blocks: Blocks, size: TileSize, device: torch.device, *, refresh: bool = False
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.rows = {stack: rows for stack, (_, rows) in blocks.items()}
        self.tiles = tiles_for(blocks, size, device, refresh=refresh)
        self._parts: dict[Any, list[_Part] | None] = {}  # by structure

    def run(
        self,
        update: Callable[[Tile, Any, bool], tuple[dict[str, Tensor], Any]],
        put: Callable[[Tile, dict[str, Tensor]], None],
        state: Any,
    ) -> Any:
        """Step the state, in its own memory, and hand the updates of every tile to `put`.

        Args:
            update: (tile, its part of the state, whether it is the first) -> (updates, new state).
        """
        leaves, structure = optree.tree_flatten(state)
        parts = self._parts_for(state, leaves, structure)
        if parts is None:
            everything = {stack: range(n) for stack, n in self.rows.items()}
            out, state = update(everything, state, True)
            put(everything, out)
            return state
        results = list(leaves)
        for i, (tile, part) in enumerate(zip(self.tiles, parts)):
            before = [_cut(leaves[k], rows) for k, rows in zip(part.indices, part.rows)]
            out, new = update(tile, optree.tree_unflatten(part.structure, before), i == 0)
            put(tile, out)
            del out  # or it would be there during the next tile
            after, found = optree.tree_flatten(new)
            if found != part.structure:
                raise ValueError("a stage changed the structure of its state on a donated step.")
            for k, rows, old, x in zip(part.indices, part.rows, before, after):
                if rows is None:
                    results[k] = x
                else:
                    _store(old, x)
        return optree.tree_unflatten(structure, results)

    def _parts_for(self, state: Any, leaves: list[Any], structure: Any) -> list[_Part] | None:
        if len(self.tiles) < 2:
            return None
        if structure not in self._parts:
            self._parts[structure] = self._found_parts(state, leaves, structure)
        return self._parts[structure]

    def _found_parts(self, state: Any, leaves: list[Any], structure: Any) -> list[_Part] | None:
        """None where the state can't be cut: something of a stack does not lead with its rows,
        several guards would each have to look at the whole state, or ranks exchange all of it.
        """
        kinds = [type(node) for _, node in walk(state)]
        if kinds.count(GuardedState) > 1 or ShardedState in kinds:
            return None
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        stack_of: dict[int, str] = {}

        def note(place: Place, x: Tensor, index: int) -> int:
            if place.stack is not None and x.ndim > 0:
                stack_of[index] = place.stack
            return index

        numbered = optree.tree_unflatten(structure, range(len(leaves)))
        map_tensors(note, state, numbered, stacks=self.rows)
        if any(leaves[k].shape[0] != self.rows[stack] for k, stack in stack_of.items()):
            return None
        parts = []
        for tile in self.tiles:
            mine = map_tensors(note, state, numbered, stacks=self.rows, only=tile)
            indices, own = optree.tree_flatten(mine)
            rows = [tile[stack_of[k]] if k in stack_of else None for k in indices]
            parts.append(_Part(own, indices, rows))
        return parts


def _cut(x: Tensor, rows: range | None) -> Tensor:
    # What is not by rows is copied: this tile may write into it, and the next starts from the same.
    return x.clone() if rows is None else x.narrow(0, rows.start, len(rows))


def _store(old: Tensor, new: Tensor) -> None:
    """Write new rows over the old, unless a stage did so itself."""
    if new is old or (new.data_ptr() == old.data_ptr() and new.stride() == old.stride()):
        return
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"a stage turned a tensor of its state from {old.dtype} {tuple(old.shape)} to "
            f"{new.dtype} {tuple(new.shape)} on a donated step."
        )
    old.copy_(new)
