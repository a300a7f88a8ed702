"""Where the parts of sharded parameters are, who owns which block, and who sends what to whom.

FSDP2, HSDP, tensor and expert parallelism make DTensors, of which a rank has a part. Owners, state
and steps are those of whole parameters, and so are the numbers: a block is put together where it is
owned, before its step (`transfer.py`).
"""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from funshampoo.blocks.executor import Leaves
from funshampoo.blocks.layout import Layout
from funshampoo.blocks.portions import Portion
from funshampoo.core.boxes import Holding, holding
from funshampoo.core.placed import is_in_parts
from funshampoo.distributed.agreement import lines_of, print_of
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects, rank_and_size
from funshampoo.distributed.described import Line
from funshampoo.distributed.disagreement import disagreement
from funshampoo.distributed.ownership import nearest
from funshampoo.distributed.pieces import Cuts, View
from funshampoo.distributed.routes import Column, Held, Messages, Route, Routes, Slot, find_routes
from funshampoo.distributed.shards import Piece, Shards, shards_of


class Incoming(NamedTuple):
    """Some of a rank's rows, and how their gradients come.

    Attributes:
        rows: of those that it owns, counted from 0.
        route: to the rank, in whose pieces the first of these rows has number 0.
    """

    rows: Portion
    route: Route


class FlatUpdates(NamedTuple):
    """The updates of a rank's parts of one dtype, one after the other in a flat tensor.

    Attributes:
        parameters, sizes: which, and how many numbers of each are here.
        slots: which pieces come into them, to be put at the `cuts`.
    """

    dtype: torch.dtype
    parameters: list[int]
    sizes: list[int]
    slots: list[int]
    cuts: Cuts


class Parts:
    """Where the parts of some parameters are, and who sends what to whom. Asks all ranks.

    Args:
        leaves: the parameters, or gradients in their place.
        costs: {stack: what a block of it costs its owner}.

    Attributes:
        held: what this rank holds of every parameter.
        shards: the owners of all rows: near to those who hold them, within a balance.
        rows: {stack: the rows that this rank owns, counted from 0}.
        ids: {stack: which of the full stack they are}.
        owned: the same, as `ShardedState` has it.
        dtypes: of the gradients as they came last, at first the parameters'. Messages have room for
            those that are missing, so that they are the same, and as long as others expect.
        memory: {dtype of the updates on the way: buffers of its steps}; theirs end with it.

    Raises:
        RuntimeError: the ranks have other parameters; or their parts are not all there is.
        NotImplementedError: placements, or a merged shape, that are not supported.
    """

    def __init__(
        self, leaves: Leaves, costs: Mapping[str, float], group: ProcessGroup | None
    ) -> None:
        self.layout: Layout = leaves.where
        self.rank, self.size = rank_and_size(group)
        known: Any = leaves.gradients if leaves.parameters is None else leaves.parameters
        self.held = [holding(x, p.merged) for x, p in zip(known, self.layout.parameters)]
        self._held = _gathered(lines_of(leaves), self.held, self.size, group)
        self.shards = near_shards(self.layout, costs, self._held)
        own = [piece for piece in self.shards.pieces if piece.owner == self.rank]
        self.owned: dict[str, dict[str, tuple[()]]] = {}
        self.ids: dict[str, tuple[int, ...]] = {}
        for piece in own:
            self.ids[piece.stack] = (*self.ids.get(piece.stack, ()), *piece.all_rows)
            spans = self.owned.setdefault(piece.stack, {})
            spans[f"{piece.first}:{piece.first + piece.rows}"] = ()
        self.rows: Portion = {stack: range(len(ids)) for stack, ids in self.ids.items()}
        self.dtypes: list[torch.dtype] = [x.dtype for x in known]
        self.memory: dict[torch.dtype, dict[Any, Any]] = {}
        self._costs = costs
        self._routes: dict[tuple[bool, ...], Routes] = {}
        self._incoming: dict[Any, list[Incoming]] = {}
        self._messages: dict[Any, tuple[Messages, Messages]] = {}
        self._cuts: dict[tuple[str, int], Any] = {}

    def come_in_other_dtypes(self, leaves: Leaves) -> bool:
        """Whether a sharded gradient has another dtype than before, so another message.

        A rank where it is missing does not know, so the ranks have to compare.
        """
        each = zip(self.dtypes, leaves.gradients)
        return any([g is not None and g.dtype != d and is_in_parts(g) for d, g in each])

    def forget_dtypes(self, leaves: Leaves) -> None:
        """Begin with those of the parameters, as on a first step."""
        if leaves.parameters is not None:  # without them no gradient is missing
            self.dtypes[:] = [p.dtype for p in leaves.parameters]

    def routes(self, shown: Sequence[bool] | None) -> Routes:
        """Of this rank; `shown` parameters travel with their gradients."""
        key = tuple(shown or [False] * len(self.held))
        if key not in self._routes:
            found = find_routes(self.layout, self.shards.pieces, self._held, key, self.rank)
            self._routes[key] = found
        return self._routes[key]

    def incoming(self, shown: Sequence[bool] | None, portions: int) -> list[Incoming]:
        """The gradients of this rank's rows, in as many portions as on every other rank."""
        whole = self.routes(shown).gather
        if portions == 1:
            return [Incoming(self.rows, whole)]
        key = tuple(shown or [False] * len(self.held))
        if (key, portions) not in self._incoming:
            self._incoming[key, portions] = found = []
            done: dict[str, int] = {}
            for owned in divided(self.shards.pieces, self._costs, portions):
                rows: Portion = {}
                for piece in owned:
                    if piece.owner == self.rank:
                        first = done.get(piece.stack, 0)
                        done[piece.stack] = last = first + piece.rows
                        start = rows[piece.stack].start if piece.stack in rows else first
                        rows[piece.stack] = range(start, last)
                route = find_routes(self.layout, owned, self._held, key, self.rank).gather
                found.append(Incoming(rows, route))
        return self._incoming[key, portions]

    def cuts_of_rows(
        self, route: Route, slots: Sequence[Slot], rows: Portion
    ) -> list[tuple[Column, str, list[int], Cuts]]:
        """(column, stack, which of these pieces are in it, where in its rows) of a gather."""
        key = "rows", id(route)
        if key not in self._cuts:
            groups: dict[tuple[Column, str], list[int]] = {}
            for i, slot in enumerate(slots):
                groups.setdefault((slot.column, slot.stack), []).append(i)
            self._cuts[key] = [
                (column, stack, places, Cuts([(p.shape, p.rows) for p in found], numel))
                for (column, stack), places in groups.items()
                for found in [[slots[i].piece for i in places]]
                for numel in [len(rows[stack]) * math.prod(self.layout.stacks[stack].block)]
            ]
        found: list[tuple[Column, str, list[int], Cuts]] = self._cuts[key]
        return found

    def cuts_of_updates(self, route: Route, slots: Sequence[Slot]) -> list[FlatUpdates]:
        """Where these pieces are in the updates of this rank's parts."""
        key = "updates", id(route)
        if key not in self._cuts:
            kinds: dict[torch.dtype, list[int]] = {}
            for i, where in enumerate(self.layout.parameters):
                stacks = [self.layout.stacks[region.stack].dtype for region in where.regions]
                kinds.setdefault(stacks[0] if stacks else torch.float32, []).append(i)
            self._cuts[key] = [self._flat(d, own, slots) for d, own in kinds.items()]
        updates: list[FlatUpdates] = self._cuts[key]
        return updates

    def _flat(self, dtype: torch.dtype, own: list[int], slots: Sequence[Slot]) -> FlatUpdates:
        sizes = [math.prod(self.held[i].shape) for i in own]
        starts = dict(zip(own, [0, *itertools.accumulate(sizes)]))
        places = [k for k, slot in enumerate(slots) if slot.parameter in starts]
        views = []
        for k in places:
            (shape, (stride, offset), _), parameter = slots[k].piece, slots[k].parameter
            views.append((shape, View(stride, starts[parameter] + offset)))
        return FlatUpdates(dtype, own, sizes, places, Cuts(views, sum(sizes)))

    def messages(
        self, route: Route, dtypes: Mapping[tuple[int, int], torch.dtype], head: int
    ) -> tuple[Messages, Messages]:
        """Of one direction: those that go out, and those that come in."""
        key = id(route), head, tuple(dtypes.items())
        if key not in self._messages:
            both = Messages(route.out, dtypes, head), Messages(route.into, dtypes, head)
            self._messages[key] = both
        return self._messages[key]


def _gathered(
    lines: list[Line], held: list[Holding], size: int, group: ProcessGroup | None
) -> Held:
    """What every rank holds of every parameter, and on which node. A collective.

    Equal holdings are sent once: a model has few shapes. So are the lines, if ranks disagree.
    """
    if size == 1:
        return Held([held])
    numbers = {own: i for i, own in enumerate(dict.fromkeys(held))}
    said = print_of(lines), socket.gethostname(), list(numbers), [numbers[own] for own in held]
    everyone = gathered_objects(said, group)
    if any(of_rank[0] != said[0] for of_rank in everyone):  # so every rank comes
        raise disagreement(lines, group)
    holdings = [[kinds[i] for i in indices] for *_, kinds, indices in everyone]
    return Held(holdings, nodes_of([host for _, host, *_ in everyone]))


def nodes_of(hosts: Sequence[str]) -> list[int]:
    """The node of every rank: equal hosts are one node, in the order of their first ranks.

    >>> nodes_of(["b", "b", "a", "b"])
    [0, 0, 1, 0]
    """
    numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]


def divided(owned: Sequence[Piece], costs: Mapping[str, float], portions: int) -> list[list[Piece]]:
    """The rows of all ranks in portions, of each owner's about equally much work; some are empty.

    Args:
        owned: by owner, as in `Shards`.
        costs: {stack: what a block of it costs}.

    >>> owned = [Piece("8", 0, 3, owner=0), Piece("4", 0, 2, owner=0)]
    >>> for portion in divided(owned, {"8": 2.0, "4": 1.0}, 2):
    ...     print([(piece.stack, piece.all_rows) for piece in portion])
    [('8', range(0, 2))]
    [('8', range(2, 3)), ('4', range(0, 2))]
    """
    found: list[list[Piece]] = [[] for _ in range(portions)]
    for _, own in itertools.groupby(owned, key=lambda piece: piece.owner):
        pieces, done = list(own), 0.0
        total = sum(piece.rows * costs[piece.stack] for piece in pieces) or 1.0
        for piece in pieces:
            cost, first = costs[piece.stack], piece.first
            middles = [(done + (row + 0.5) * cost) / total for row in range(piece.rows)]
            done += piece.rows * cost
            for k, run in itertools.groupby(min(int(portions * m), portions - 1) for m in middles):
                rows = len(list(run))
                found[k].append(piece._replace(first=first, rows=rows))
                first += rows
    return found


def near_shards(layout: Layout, costs: Mapping[str, float], held: Held) -> Shards:
    """The owners of all rows, by `nearest`."""
    of_rows = held.of_blocks(layout)
    each = [costs[stack] for stack, rows in of_rows.items() for _ in rows]
    shares = [own.of_rank for rows in of_rows.values() for own in rows]
    owners = nearest(each, shares, held.nodes)
    found, at = {}, 0
    for stack, rows in of_rows.items():
        found[stack] = owners[at : at + len(rows)]
        at += len(rows)
    return shards_of(layout.stacks, found, held.size, torch.float32)
