"""A donated step of `blocked`: gradients in and updates out in one pass each, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout, block_ids
from funshampoo.blocks.regions import Parts, viewed
from funshampoo.blocks.tiles import Tile, TileSize, Tiling
from funshampoo.core.contract import GradientTransformation, is_refresh
from funshampoo.core.tree import compute_dtype
from funshampoo.state.places import rows_of
from funshampoo.state.stages import ShardedState


class Given(NamedTuple):
    """What was given to a step.

    Attributes:
        leaves: gradients.
        missing: indices of those that are None.
        shown: the parameters that the inner transformation may see.
    """

    leaves: list[Any]
    spec: Any
    layout: Layout
    missing: list[int]
    shown: list[Tensor | None] | None


Put: TypeAlias = Callable[[str, range, Tensor], None]  # (stack, rows, their updates)


class TiledSteps:
    """Donated steps, for the layouts that were seen last."""

    def __init__(self, size: TileSize) -> None:
        self._size = size
        self._known: dict[int, TiledStep] = {}

    def of(self, layout: Layout) -> TiledStep:
        """The one for this layout. Layouts are remembered, so that their identity says it all."""
        found = self._known.get(id(layout))
        if found is None or found.layout is not layout:
            if len(self._known) > 8:
                self._known.clear()
            found = self._known[id(layout)] = TiledStep(layout, self._size)
        return found


class TiledStep:
    """A donated step on the blocks of one layout."""

    def __init__(self, layout: Layout, size: TileSize) -> None:
        self.layout = layout
        self.parts = Parts(layout)
        stacks = layout.stacks
        device = next((s.device for s in stacks.values()), torch.device("cpu"))
        self._size = size
        self._ids = block_ids(layout)
        blocks = {name: (s.block, s.rows) for name, s in stacks.items()}
        self._plain, self._refresh = (
            Tiling(blocks, size, device, refresh=refresh) for refresh in (False, True)
        )

    def run(
        self,
        inner: GradientTransformation,
        state: Any,
        given: Given,
        put: Put,
        context: dict[str, Any],
    ) -> Any:
        """Step `inner` and hand the updates to `put`. Returns the new state."""
        if isinstance(state, ShardedState):
            return self._run_sharded(inner, state, given, put, context)

        def update(tile: Tile, part: Any, first: bool) -> tuple[dict[str, Tensor], Any]:
            ids = {name: self._ids[name][rows.start : rows.stop] for name, rows in tile.items()}
            stacks, params = self._cut(tile, given)
            looks = {"whole": state} if first else {"stops": False}
            here = {**context, "gradient": stacks, "block_ids": ids, **looks}
            found: tuple[dict[str, Tensor], Any] = inner.update(stacks, part, params, **here)
            return found

        def put_all(tile: Tile, updates: dict[str, Tensor]) -> None:
            for name, rows in tile.items():
                put(name, rows, updates[name])

        tiling = self._refresh if is_refresh(inner, state, context) else self._plain
        return tiling.run(update, put_all, state)

    def _run_sharded(
        self,
        inner: GradientTransformation,
        state: ShardedState,
        given: Given,
        put: Put,
        context: dict[str, Any],
    ) -> Any:
        """`sharded` makes tiles of its own, and returns [(first row, updates)] for every stack."""
        owned = {name: rows_of(spans) for name, spans in state.owned.items()}
        known = {name: rows for name, rows in owned.items() if name in self.layout.stacks}
        stacks, params = self._cut({n: range(r[0], r[-1] + 1) for n, r in known.items()}, given)
        context |= {"gradient": stacks, "block_ids": self._ids, "stacks": self.layout.stacks}
        pieces, new = inner.update(stacks, state, params, tile=self._size, pieces=True, **context)
        for name, found in pieces.items():
            for first, values in found:
                put(name, range(first, first + len(values)), values)
        return new

    def _cut(self, tile: Tile, given: Given) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        stacks = {n: self.parts.gather(n, rows, given.leaves) for n, rows in tile.items()}
        if given.shown is None:
            return stacks, None
        shown = [torch.zeros_like(g) if p is None else p for p, g in zip(given.shown, given.leaves)]
        return stacks, {n: self.parts.gather(n, rows, shown) for n, rows in tile.items()}


class Results:
    """The updates of all leaves, filled piece by piece.

    Args:
        copies: the pieces are in memory that the next step uses again.
    """

    def __init__(self, parts: Parts, given: Given, copies: bool) -> None:
        self._parts, self._given, self._copies = parts, given, copies
        self._found: list[Tensor | None] = [None] * len(given.leaves)

    @property
    def leaves(self) -> list[Tensor]:
        """One update a leaf; zeros for a parameter without elements."""
        return [self._empty(i) if x is None else x for i, x in enumerate(self._found)]

    def put(self, stack: str, rows: range, values: Tensor) -> None:
        """Store some rows."""
        found = self._parts.of(stack, rows)
        if not self._copies and found.whole:
            for part, own in zip(found.parts, values.unbind(0)):
                shape = self._given.layout.parameters[part.parameter].shape
                self._found[part.parameter] = viewed(own, shape)
            return
        for i in {part.parameter for part in found.parts}:
            self._found[i] = self._empty(i) if self._found[i] is None else self._found[i]
        self._parts.scatter(stack, rows, values, self._found)

    def _empty(self, i: int) -> Tensor:
        leaf, where = self._given.leaves[i], self._given.layout.parameters[i]
        dtype = compute_dtype(leaf)
        if where.regions:
            dtype = self._given.layout.stacks[where.regions[0].stack].dtype
        return torch.empty(where.shape, dtype=dtype, device=leaf.device)
