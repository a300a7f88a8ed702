"""A step on blocks, portion by portion: gather, step, store, scatter.

    for portion in portions:
        G = the rows of the gradients
        U, part = inner.update(G, the rows of the state, the rows of the parameters)
        part into the state, U to its destination

If blocks are spread over ranks, a rank's portions consist of the rows that it owns, and U passes
through the ranks' exchange: that of a `Ranks`, the `spread` of `sharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.layout import Layout
from funshampoo.blocks.portions import Portion, TileSize, tiles_for, without
from funshampoo.blocks.regions import Parts
from funshampoo.blocks.state_rows import Part, StateRows, joined, store, store_shared
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, refreshes
from funshampoo.core.modes import is_traced, keep_freed_memory, row_index

if TYPE_CHECKING:
    from funshampoo.distributed.ranks import Ranks

Put: TypeAlias = Callable[[str, range, Any], None]
"""(stack, its rows, their updates)"""

Gather: TypeAlias = Callable[[Portion], tuple[dict[str, Tensor], dict[str, Tensor] | None]]
"""The gradients of a portion, and the parameters that `inner` may see."""

OwnRows: TypeAlias = Mapping[str, Sequence[int]]
"""{stack: the rows of the full stack that this rank steps}"""

StepOnRows: TypeAlias = Callable[[Any, OwnRows, Sequence[Portion], Gather, Put], Any]
"""(inner state, own rows, portions arriving together, gather, put) -> new state"""

Missing: TypeAlias = Mapping[str, Collection[int]]
"""{stack: the rows without a gradient}"""


class Leaves(NamedTuple):
    """What is stepped, in an order that must be the same on all ranks.

    Attributes:
        names: of the leaves.
        parameters: None if the step did not get them.
        gradients: None for a leaf without one.
        where: where the leaves are in blocks, equal for equal shapes: a `Layout`; for leaves
            outside blocks, their sharding.
        shown: which parameters the step reads; None: none.
    """

    names: Sequence[str]
    parameters: Sequence[Tensor] | None
    gradients: Sequence[Tensor | None]
    where: Any
    shown: Sequence[bool] | None = None


class Executor:
    """Steps on the blocks of one layout.

    Attributes:
        parts: where the rows of its stacks are in parameters and gradients.
    """

    def __init__(self, layout: Layout, size: TileSize) -> None:
        self.layout, self.parts = layout, Parts(layout)
        devices = [stack.device for stack in layout.stacks.values()]
        self._device = devices[0] if devices else torch.device("cpu")
        self._size = size
        self._whole: dict[str, range] = {}
        self._ids: dict[str, range] = {}  # a number for every block, counted through the stacks
        rows = 0
        for name, stack in layout.stacks.items():
            self._whole[name] = range(stack.rows)
            self._ids[name] = range(rows, rows + stack.rows)
            rows += stack.rows
        self._states = StateRows(rows)
        self._portions: dict[Any, list[Portion]] = {}

    def run(
        self,
        inner: GradientTransformation,
        state: Any,
        gather: Gather,
        put: Put,
        missing: Missing,
        context: Context,
        leaves: Callable[[], Leaves],
    ) -> Any:
        """Step `inner` on the rows that have a gradient. Returns the new state."""
        spread: Ranks | None = inner.spread
        if spread is None or not spread.whole:
            return self._step(inner, self._whole, state, gather, put, missing, context)

        def step(state: Any, own: Mapping[str, range], put: Put) -> Any:
            def gather_own(portion: Portion) -> Any:
                return gather({n: own[n][r.start : r.stop] for n, r in portion.items()})

            return self._step(spread.inner, own, state, gather_own, put, missing, context)

        return spread.exchange(step, put, state, context, leaves(), len(missing) > 0)

    def run_parts(
        self, spread: Ranks, state: Any, missing: Missing, context: Context, leaves: Leaves
    ) -> tuple[Any, list[Tensor]]:
        """`run` for sharded leaves (DTensors). Also returns their updates."""

        def step(
            state: Any, own: OwnRows, cuts: Sequence[Portion], gather: Gather, put: Put
        ) -> Any:
            return self._step(spread.inner, own, state, gather, put, missing, context, cuts)

        return spread.exchange_parts(step, state, context, leaves, len(missing) > 0)

    def _step(
        self,
        inner: GradientTransformation,
        own: OwnRows,
        state: Any,
        gather: Gather,
        put: Put,
        missing: Missing,
        context: Context,
        cuts: Sequence[Portion] | None = None,
    ) -> Any:
        """Step the rows that are this rank's own, which portions count from 0."""
        in_place = context.donate and not is_traced()
        if in_place and self._device.type == "cpu":
            keep_freed_memory()
        refresh = in_place and refreshes(inner, context)
        counted, alive = self._whole, context.alive
        ids: OwnRows = self._ids
        if own is not self._whole:
            counted = {n: range(len(rows)) for n, rows in own.items()}
            ids = {n: _rows_at(ids[n], rows) for n, rows in own.items()}
            alive = alive and {n: _rows_at(alive[n], rows) for n, rows in own.items()}
            missing = {
                n: [k for k, row in enumerate(rows) if row in missing[n]]
                for n, rows in own.items()
                if n in missing
            }
        portions = self._portions_of(cuts or [counted], missing, in_place, refresh)
        portions = portions or [{}]  # no gradients at all: shared entries still advance
        whole = len(portions) == 1 and portions[0] == counted
        parts: list[tuple[Part, Any]] = []
        shared: dict[int, Tensor] = {}
        for portion in portions:
            before, part = state, None
            if not whole:
                before, part = self._states.part(state, portion, own)
            stacks, params = gather(portion)
            here = changed(
                context,
                block_ndim=1,
                gradient=stacks,
                rows={n: ids[n][r.start : r.stop] for n, r in portion.items()},
                alive=alive and {n: alive[n][r.start : r.stop] for n, r in portion.items()},
            )
            if context.extra:
                rows = {n: own[n][r.start : r.stop] for n, r in portion.items()}
                here = changed(here, extra=self._extra_of(context.extra, rows))
            updates, after = inner.run(stacks, before, params, here)
            for name, span in portion.items():
                put(name, span, updates[name])
            del stacks, params, here, updates  # or they would still exist during the next portion
            if part is None:
                return after
            if in_place:
                store(state, part, after, shared)
            else:
                parts.append((part, after))
        store_shared(state, shared)
        return joined(state, parts) if parts else state

    def _extra_of(self, extra: Mapping[str, Any], rows: OwnRows) -> dict[str, Any]:
        """What the caller passed, with these rows of what `blocked` has made stacks of."""

        def cut(x: Any) -> Any:
            if not isinstance(x, dict) or x.keys() != self.layout.stacks.keys():
                return x
            return {n: _rows_at(x[n], r) for n, r in rows.items()}

        return {name: cut(x) for name, x in extra.items()}

    def _portions_of(
        self,
        cuts: Sequence[Portion],
        missing: Missing,
        donate: bool,
        refresh: bool,
    ) -> list[Portion]:
        """The tiles of each cut, without missing rows."""
        found = [cut for cut in cuts if cut or len(cuts) == 1]
        if donate:
            key = tuple([tuple(cut.items()) for cut in found]), refresh
            if key not in self._portions:
                self._portions[key] = [
                    {n: range(cut[n].start + r.start, cut[n].start + r.stop) for n, r in t.items()}
                    for cut in found
                    for t in self._tiles(cut, refresh)
                ]
            found = self._portions[key]
        return (
            [part for portion in found for part in without(portion, missing)] if missing else found
        )

    def _tiles(self, cut: Portion, refresh: bool) -> list[Portion]:
        blocks = {n: (self.layout.stacks[n].block, len(rows)) for n, rows in cut.items()}
        return tiles_for(blocks, self._size, self._device, refresh=refresh)


def _rows_at(x: Any, rows: Sequence[int]) -> Any:
    """These rows of a tensor, or of the numbers of all rows."""
    if isinstance(rows, range):
        return x[rows.start : rows.stop]
    if isinstance(x, Tensor):
        return x.index_select(0, row_index(tuple(rows), x.device))
    return [x[row] for row in rows]
