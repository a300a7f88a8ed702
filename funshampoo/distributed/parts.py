"""Parts of sharded parameters: where they are, who owns which block, who sends what to whom.

FSDP2, HSDP, tensor and expert parallelism make DTensors, of which each rank has a part. Owners,
state, steps and numbers are those of whole parameters: a block is assembled on its owner before its
step (`transfer.py`).
"""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from funshampoo.blocks.executor import Leaves
from funshampoo.blocks.layout import Layout
from funshampoo.blocks.portions import Portion
from funshampoo.core.boxes import Holding, holding
from funshampoo.core.placed import is_in_parts, places_of
from funshampoo.distributed.agreement import fingerprint_of, leaf_lines
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects, rank_and_size
from funshampoo.distributed.described import Line
from funshampoo.distributed.disagreement import disagreement_error
from funshampoo.distributed.ownership import nearest
from funshampoo.distributed.pieces import Cuts, View
from funshampoo.distributed.routes import Column, Held, Messages, Route, Slot, find_routes
from funshampoo.distributed.shards import OwnedRows, Shards, shards_of

RowCuts: TypeAlias = tuple[Column, str, list[int], Cuts]
"""(column, stack, which of the arriving pieces are in it, where in its rows)"""


class Incoming(NamedTuple):
    """Some of a rank's rows, and how their gradients arrive.

    Attributes:
        rows: indices among the rows that it owns, from 0.
        route: to the rank; in its pieces, the first of these rows has number 0.
        cuts: where the arriving pieces go in the rows.
    """

    rows: Portion
    route: Route
    cuts: list[RowCuts]


class FlatUpdates(NamedTuple):
    """The updates of a rank's parts of one dtype, concatenated in a flat tensor.

    Attributes:
        parameters, sizes: which parameters, and how many numbers of each are on this rank.
        slots: the arriving pieces that go into them, to be put at the `cuts`.
    """

    dtype: torch.dtype
    parameters: list[int]
    sizes: list[int]
    slots: list[int]
    cuts: Cuts


class StepRoutes(NamedTuple):
    """The collectives of a step, as one rank sees them.

    Attributes:
        incoming: gradients, one portion after the other.
        scatter: the updates' route.
        updates: where the arriving updates go.
    """

    incoming: list[Incoming]
    scatter: Route
    updates: list[FlatUpdates]


class Parts:
    """Where the parts of some parameters are, and who sends what to whom. Made by a collective.

    Args:
        leaves: the parameters, or gradients in place of them.
        costs: {stack: cost of a block to its owner}.

    Attributes:
        group: the ranks.
        placed: mesh and placements of every parameter.
        held: what this rank holds of every parameter.
        shards: the owners of all rows: near the ranks that hold them, as far as balance allows.
        ids: {stack: the rows that this rank owns}.
        owned: the same, as in `ShardedState`.
        dtypes: of the latest gradients, initially the parameters'. Messages have room for missing
            gradients, so that every message has the length that other ranks expect.
        memory: {dtype of the updates as sent: buffers of its steps}; freed with this object.

    Raises:
        RuntimeError: the ranks have other parameters; or their parts do not add up to the whole.
        NotImplementedError: placements, or a merged shape, that are not supported.
    """

    def __init__(
        self, leaves: Leaves, costs: Mapping[str, float], group: ProcessGroup | None
    ) -> None:
        self.layout: Layout = leaves.where
        self.group, (self.rank, self.size) = group, rank_and_size(group)
        known: Any = leaves.gradients if leaves.parameters is None else leaves.parameters
        self.placed = places_of(known)
        self.held = [holding(x, p.merged) for x, p in zip(known, self.layout.parameters)]
        self._held = _gathered(leaf_lines(leaves), self.held, self.size, group)
        self.shards = near_shards(self.layout, costs, self._held)
        own = [piece for piece in self.shards.pieces if piece.owner == self.rank]
        self.owned: dict[str, dict[str, tuple[()]]] = {}
        self.ids: dict[str, tuple[int, ...]] = {}
        for piece in own:
            self.ids[piece.stack] = (*self.ids.get(piece.stack, ()), *piece.all_rows)
            spans = self.owned.setdefault(piece.stack, {})
            spans[f"{piece.first}:{piece.first + piece.rows}"] = ()
        self.dtypes: list[torch.dtype] = [x.dtype for x in known]
        self.memory: dict[torch.dtype, dict[Any, Any]] = {}
        self._costs = costs
        self._step_routes: dict[tuple[tuple[bool, ...], int], StepRoutes] = {}
        self._messages: dict[Any, tuple[Messages, Messages]] = {}

    def has_new_dtypes(self, leaves: Leaves) -> bool:
        """Whether a sharded gradient has another dtype than before, and so another message length.

        A rank where the gradient is missing can't know that, so the ranks must compare.
        """
        each = zip(self.dtypes, leaves.gradients)
        return any([g is not None and g.dtype != d and is_in_parts(g) for d, g in each])

    def reset_dtypes(self, leaves: Leaves) -> None:
        """Start with the parameters' dtypes again, as on a first step."""
        if leaves.parameters is not None:  # without them no gradient is missing
            self.dtypes[:] = [p.dtype for p in leaves.parameters]

    def step_routes(self, shown: Sequence[bool] | None, portions: int) -> StepRoutes:
        """The collectives for this rank's rows and parts.

        Args:
            shown: which parameters are sent with their gradients; None: none.
            portions: the number in which the gradients arrive; the same on every rank.
        """
        key = tuple(shown or [False] * len(self.held)), portions
        if key not in self._step_routes:
            whole = find_routes(self.layout, self.shards.pieces, self._held, key[0], self.rank)
            incoming, done = [], dict[str, int]()
            for owned in divided(self.shards.pieces, self._costs, portions):
                rows: Portion = {}
                for piece in owned:
                    if piece.owner == self.rank:
                        first = done.get(piece.stack, 0)
                        done[piece.stack] = last = first + piece.rows
                        start = rows[piece.stack].start if piece.stack in rows else first
                        rows[piece.stack] = range(start, last)
                route = whole.gather
                if portions > 1:
                    route = find_routes(self.layout, owned, self._held, key[0], self.rank).gather
                incoming.append(Incoming(rows, route, self._row_cuts(route.arriving(), rows)))
            updates = self._flat_updates(whole.scatter.arriving())
            self._step_routes[key] = StepRoutes(incoming, whole.scatter, updates)
        return self._step_routes[key]

    def _row_cuts(self, slots: Sequence[Slot], rows: Portion) -> list[RowCuts]:
        """Where these pieces of a gather go in its rows."""
        groups: dict[tuple[Column, str], list[int]] = {}
        for i, slot in enumerate(slots):
            groups.setdefault((slot.column, slot.stack), []).append(i)
        found = []
        for (column, stack), places in groups.items():
            views = [(slots[i].piece.shape, slots[i].piece.rows) for i in places]
            numel = len(rows[stack]) * math.prod(self.layout.stacks[stack].block)
            found.append((column, stack, places, Cuts(views, numel)))
        return found

    def _flat_updates(self, slots: Sequence[Slot]) -> list[FlatUpdates]:
        """Where these pieces go in the updates of this rank's parts."""
        kinds: dict[torch.dtype, list[int]] = {}
        for i, where in enumerate(self.layout.parameters):
            stacks = [self.layout.stacks[region.stack].dtype for region in where.regions]
            kinds.setdefault(stacks[0] if stacks else torch.float32, []).append(i)
        found = []
        for dtype, own in kinds.items():
            sizes = [math.prod(self.held[i].shape) for i in own]
            starts = dict(zip(own, [0, *itertools.accumulate(sizes)]))
            places = [k for k, slot in enumerate(slots) if slot.parameter in starts]
            views = []
            for k in places:
                (shape, (stride, offset), _), parameter = slots[k].piece, slots[k].parameter
                views.append((shape, View(stride, starts[parameter] + offset)))
            found.append(FlatUpdates(dtype, own, sizes, places, Cuts(views, sum(sizes))))
        return found

    def messages(
        self, route: Route, dtypes: Mapping[tuple[int, int], torch.dtype], head: int
    ) -> tuple[Messages, Messages]:
        """The messages of one direction: outgoing and incoming."""
        key = id(route), head, tuple(dtypes.items())
        if key not in self._messages:
            both = Messages(route.out, dtypes, head), Messages(route.into, dtypes, head)
            self._messages[key] = both
        return self._messages[key]


def _gathered(
    lines: list[Line], held: list[Holding], size: int, group: ProcessGroup | None
) -> Held:
    """What every rank holds of every parameter, and on which node. A collective.

    Equal holdings are sent once: a model has few shapes. So are the lines, unless ranks disagree.
    """
    if size == 1:
        return Held([held])
    one: dict[Holding, Holding] = {}  # pickle sends an object once
    mine = [one.setdefault(own, own) for own in held]
    everyone = gathered_objects((fingerprint_of(lines), socket.gethostname(), mine), group)
    prints, hosts, holdings = zip(*everyone)
    if len(set(prints)) > 1:  # on every rank, so all enter
        raise disagreement_error(lines, group)
    return Held(holdings, nodes_of(hosts))


def nodes_of(hosts: Sequence[str]) -> list[int]:
    """The node of every rank: equal hosts are one node, numbered in the order of their first ranks.

    >>> nodes_of(["b", "b", "a", "b"])
    [0, 0, 1, 0]
    """
    numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]


def divided(
    owned: Sequence[OwnedRows], costs: Mapping[str, float], portions: int
) -> list[list[OwnedRows]]:
    """The rows of all ranks in portions of about equal work for each owner; some are empty.

    Args:
        owned: by owner, as in `Shards`.
        costs: {stack: cost of a block}.

    >>> owned = [OwnedRows("8", 0, 3, owner=0), OwnedRows("4", 0, 2, owner=0)]
    >>> for portion in divided(owned, {"8": 2.0, "4": 1.0}, 2):
    ...     print([(piece.stack, piece.all_rows) for piece in portion])
    [('8', range(0, 2))]
    [('8', range(2, 3)), ('4', range(0, 2))]
    """
    found: list[list[OwnedRows]] = [[] for _ in range(portions)]
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
    owners = iter(nearest(each, shares, held.nodes))
    found = {s: list(itertools.islice(owners, len(rows))) for s, rows in of_rows.items()}
    return shards_of(layout.stacks, found, held.size, torch.float32)
