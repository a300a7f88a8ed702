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

from funshampoo.blocks.layout import Layout, block_ids
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

StepOnRows: TypeAlias = Callable[
    [Any, Mapping[str, Sequence[int]], Sequence[Portion], Gather, Put], Any
]
"""(inner state, rows of the full stacks, portions arriving together, gather, put) -> new state"""

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
        self._ids = block_ids(layout)
        self._whole = {name: range(stack.rows) for name, stack in layout.stacks.items()}
        self._rows: dict[Any, StateRows] = {}
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
        own, owner = spread.owned(self.layout), spread.inner

        def step(state: Any, put: Put) -> Any:
            return self._step(owner, own, state, gather, put, missing, context)

        return spread.exchange(step, put, state, context, leaves(), len(missing) > 0)

    def run_parts(
        self, spread: Ranks, state: Any, missing: Missing, context: Context, leaves: Leaves
    ) -> tuple[Any, list[Tensor]]:
        """`run` for sharded leaves (DTensors). Also returns their updates."""
        owner = spread.inner

        def step(
            state: Any,
            rows: Mapping[str, Sequence[int]],
            cuts: Sequence[Portion],
            gather: Gather,
            put: Put,
        ) -> Any:
            own = {stack: range(len(mine)) for stack, mine in rows.items()}
            ids = {stack: [self._ids[stack][r] for r in mine] for stack, mine in rows.items()}
            absent = {
                s: [k for k, r in enumerate(rows[s]) if r in missing.get(s, ())] for s in rows
            }
            alive = context.alive and {
                stack: x.index_select(0, row_index(tuple(rows[stack]), x.device))
                for stack, x in context.alive.items()
                if stack in rows
            }
            here = changed(context, alive=alive)
            lacking = {s: gone for s, gone in absent.items() if gone}
            return self._step(owner, own, state, gather, put, lacking, here, ids, cuts)

        return spread.exchange_parts(step, state, context, leaves, len(missing) > 0)

    def _step(
        self,
        inner: GradientTransformation,
        own: dict[str, range],
        state: Any,
        gather: Gather,
        put: Put,
        missing: Missing,
        context: Context,
        ids: Mapping[str, Sequence[int]] | None = None,
        cuts: Sequence[Portion] | None = None,
    ) -> Any:
        ids = self._ids if ids is None else ids
        in_place = context.donate and not is_traced()
        if in_place and self._device.type == "cpu":
            keep_freed_memory()
        refresh = in_place and refreshes(inner, context)
        portions = self._portions_of(cuts or [own], missing, in_place, refresh)
        portions = portions or [{}]  # no gradients at all: shared entries still advance
        whole = len(portions) == 1 and portions[0] == own
        alive: Mapping[str, Tensor] | None = context.alive
        parts: list[tuple[Part, Any]] = []
        shared: dict[int, Tensor] = {}
        for portion in portions:
            before, part = state, None
            if not whole:
                before, part = self._state_rows(own).part(state, portion)
            stacks, params = gather(portion)
            here = changed(
                context,
                block_ndim=1,
                gradient=stacks,
                rows={n: ids[n][r.start : r.stop] for n, r in portion.items()},
                alive=alive and {n: alive[n][r.start : r.stop] for n, r in portion.items()},
            )
            if context.extra:
                here = changed(here, extra=self._rows_of(context.extra, portion))
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

    def _rows_of(self, extra: Mapping[str, Any], portion: Portion) -> dict[str, Any]:
        """What the caller passed, with these rows of what `blocked` has made stacks of."""

        def rows(value: Any) -> Any:
            if not isinstance(value, dict) or value.keys() != self.layout.stacks.keys():
                return value
            return {n: value[n][r.start : r.stop] for n, r in portion.items()}

        return {name: rows(value) for name, value in extra.items()}

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

    def _state_rows(self, own: dict[str, range]) -> StateRows:
        key = tuple(own.items())
        if key not in self._rows:
            self._rows[key] = StateRows(own)
        return self._rows[key]


class Executors:
    """Executors for the most recent layouts."""

    def __init__(self, size: TileSize) -> None:
        self._size = size
        self._known: dict[int, Executor] = {}

    def of(self, layout: Layout) -> Executor:
        """The executor of this layout. Layouts are cached, so they are compared by identity."""
        if torch.compiler.is_dynamo_compiling():
            return Executor(layout, self._size)
        found = self._known.get(id(layout))
        if found is None or found.layout is not layout:
            if len(self._known) > 8:
                self._known.clear()
            found = self._known[id(layout)] = Executor(layout, self._size)
        return found
