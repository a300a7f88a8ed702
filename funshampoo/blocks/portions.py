"""The portions of a step: some rows of some stacks at a time.

Blocks are independent, so they may be stepped in any order. If each stage ran on all of them, a
step would hold several tensors as large as the model; they don't fit into a cache, and on a CPU new
memory costs a page fault every 4 KiB, often more than the arithmetic on it. So a step that may
write into its state goes tile by tile: a tile goes through all stages before the next one starts,
with the same results as without tiles. Rows without a gradient are in no portion.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import torch

Portion: TypeAlias = dict[str, range]  # {stack: consecutive rows}
TileSize: TypeAlias = int | Literal["auto"] | None

Blocks: TypeAlias = Mapping[str, tuple[tuple[int, ...], int]]  # {stack: (block, rows)}

NUMBERS = 2**20
"""Most numbers in a tile, for each of two kernel threads or more: 4 MiB in float32, of which a step
holds about four, so that they fit into a CPU's last cache. Up to this, everything is one tile."""

SHARE = 4
"""A stack with more work than `FLOPS` is cut into tiles of about this share of all numbers, so that
the four that a step holds are about as large as the parameters."""

NUMBERS_ELSEWHERE = 2**26
"""Most numbers in a tile on other devices: 256 MiB in float32, so that kernels run for as long as a
hundred launches take, and a large model's step holds no copies of it."""

NUMBERS_AT_ONCE = 2**22
"""On a step that refreshes roots everything up to this is one tile, and beyond it tiles are as
large as `NUMBERS` allows: threads share a tile's roots, and in each tile wait for the last."""

FLOPS = 1e9
"""Operations of a tile's products, approximately: ten milliseconds or more, compared with which
the fixed cost of another tile, less than one, is negligible."""


def tiles_for(
    blocks: Blocks, size: TileSize, device: torch.device, *, refresh: bool = False
) -> list[Portion]:
    """The tiles of these stacks.

    Args:
        blocks: {stack: (block, rows)}.
        device: where they are.
        size: numbers in a tile; "auto" weighs a tile's memory against its overhead on a CPU, and
            makes large tiles elsewhere, where kernels wait to be launched. None: no tiles.
        refresh: whether the step recomputes roots.
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
) -> list[Portion]:
    """Light stacks together, heavy ones in parts of `least` rows, or 4, 8, 12 and so on.

    Threads take whole matrices: seven rows keep two of them busy as long as eight. Products of a
    stack with a single row are split among threads, and rounded differently.

    Args:
        rows: of each stack.
        weights: of one row of each stack.
        most: approximate weight of a tile.
        least: rows of a part, at least 2. Roots are computed tile by tile, so with fewer rows than
            threads some would be idle.

    >>> tiles_of({"4x4": 5, "4": 3, "2": 1}, {"4x4": 16, "4": 4, "2": 2}, 30)
    [{'4x4': range(0, 2)}, {'4x4': range(2, 5)}, {'4': range(0, 3), '2': range(0, 1)}]
    """
    tiles: list[Portion] = []
    light: Portion = {}
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
    """The rows in runs of about `most`; a single remaining row joins the last run.

    >>> _parts(11, 5.0, 2), _parts(9, 1.0, 2)
    ([range(0, 4), range(4, 8), range(8, 11)], [range(0, 2), range(2, 4), range(4, 6), range(6, 9)])
    """
    step = max(least, round(most / 4) * 4)
    bounds = [*range(0, max(rows - 1, 1), step), rows]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def without(portion: Portion, missing: Mapping[str, Collection[int]]) -> list[Portion]:
    """The portion without some rows: the first run of each stack's remaining rows, the second, ...

    >>> without({"4": range(0, 6), "2": range(0, 2)}, {"4": {2, 3}})
    [{'4': range(0, 2), '2': range(0, 2)}, {'4': range(4, 6)}]
    """
    if not any(stack in missing for stack in portion):
        return [portion]
    found: list[Portion] = []
    for stack, rows in portion.items():
        ends = [rows.start - 1, *sorted(r for r in missing.get(stack, ()) if r in rows), rows.stop]
        runs = [range(a + 1, b) for a, b in itertools.pairwise(ends) if a + 1 < b]
        found += [{} for _ in runs[len(found) :]]
        for portion_, run in zip(found, runs):
            portion_[stack] = run
    return found
