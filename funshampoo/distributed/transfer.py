"""The transport of sharded parameters: gradients to the owners, updates to the holders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.executor import Leaves
from funshampoo.blocks.portions import Portion
from funshampoo.core.modes import for_keeps
from funshampoo.core.placed import local_parts
from funshampoo.distributed.collectives import all_to_all_into
from funshampoo.distributed.exchange import Transport
from funshampoo.distributed.parts import Parts
from funshampoo.distributed.pieces import as_view
from funshampoo.distributed.routes import GRADIENTS, HEAD, PARAMETERS, Column, Messages, Slot
from funshampoo.distributed.shards import STATUS

Memory = dict[Any, tuple[Tensor, list[Tensor]]]


class Transfer(Transport):
    """The communication of one step: all_to_all_single of the bytes that have to move.

    There is one collective back, and one to the owners per portion of the rows. The latter all
    start at once; each is waited for when its portion is stepped, and the others arrive meanwhile.
    On CUDA, NCCL runs them on its own stream, and only the stream of the step waits.

    Args:
        leaves: gradients, and parameters if some are shown.
        portions: how many; the same on every rank.
        dtype: of the updates as sent.
        memory: buffers, and views of them, reused from earlier steps.

    Attributes:
        cuts: the rows of this rank in each portion.
        updates: after `exchange_updates`, those of this rank's parts, each flat, in new memory.
    """

    def __init__(
        self,
        parts: Parts,
        leaves: Leaves,
        portions: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory,
    ) -> None:
        self._parts, self._leaves = parts, leaves
        self._plan = parts.step_routes(leaves.shown, portions)
        self.cuts = [incoming.rows for incoming in self._plan.incoming]
        self._device, self._dtype, self._memory = device, dtype, memory
        self.status = torch.zeros(STATUS, dtype=torch.float32, device=device)
        stacks = parts.layout.stacks
        if "sent" not in memory:
            shapes = [torch.Size((len(ids), *stacks[s].block)) for s, ids in parts.ids.items()]
            numel = [shape.numel() for shape in shapes]
            with for_keeps():
                sent = torch.zeros(sum(numel), dtype=dtype, device=device)
                split = [x.view(s) for x, s in zip(torch.split(sent, numel), shapes)]
            memory["sent"] = sent, split
        self.sent = memory["sent"][0]
        self.places = dict(zip(parts.ids, memory["sent"][1]))
        self._flat: dict[Column, list[Tensor | None]] = {}
        self._messages: list[tuple[Messages, Messages]] = []  # of collectives already met
        self._pending: list[Callable[[], list[Tensor]]] = []
        self._received: dict[int, dict[int, dict[str, Tensor]]] = {}  # {portion: {column: stacks}}
        self.updates: list[Tensor] = []

    def gather(self) -> None:
        """Send the parts of all rows that this rank holds. A collective."""
        leaves, dtypes = self._leaves, self._parts.dtypes
        dtypes[:] = [d if x is None else x.dtype for d, x in zip(dtypes, leaves.gradients)]
        columns: dict[Column, Sequence[Any]] = {GRADIENTS: leaves.gradients}
        sent_dtypes = {(GRADIENTS, i): dtype for i, dtype in enumerate(dtypes)}
        if leaves.shown is not None and leaves.parameters is not None:
            columns[PARAMETERS] = leaves.parameters
            sent_dtypes |= {(PARAMETERS, i): x.dtype for i, x in enumerate(leaves.parameters)}
        failure: BaseException | None = None
        for incoming in self._plan.incoming:
            out, into = self._parts.messages(incoming.route, sent_dtypes, 0)
            self._messages.append((out, into))
            sending, views = self._buffer(out)
            try:
                for column, tensors in columns.items() if not self._flat else ():
                    self._flat[column] = _flat(tensors)
                _fill(views, self._sources(out.slots))
            except BaseException as error:  # of any type: the other ranks are waiting
                failure = failure or error
            self._pending.append(self._start_exchange(sending, out, into, len(self.cuts) == 1))
        if failure is not None:
            raise failure

    def _sources(self, slots: Sequence[Slot]) -> list[Tensor | None]:
        """This rank's data for these pieces; None if there is no gradient."""
        found = []
        for column, parameter, _, (shape, local, _) in slots:
            x = self._flat[column][parameter]
            whole = x is None or x.shape == shape  # flat like x itself: all of it
            found.append(x if x is None or whole else as_view(x, shape, local))
        return found

    def rows_of(self, portion: Portion) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The gradients of these rows of this rank, and their parameters, if any are shown.

        Args:
            portion: one of the `cuts`, or a part of one.
        """
        at = next(
            i
            for i, cut in enumerate(self.cuts)
            if all(s in cut and cut[s].start <= r.start < cut[s].stop for s, r in portion.items())
        )
        if at not in self._received:
            self._received.clear()  # the previous portion is no longer needed
            self._received[at] = self._put_together(at)
        cut = self.cuts[at]
        parts = {
            column: {s: x[s].narrow(0, r.start - cut[s].start, len(r)) for s, r in portion.items()}
            for column, x in self._received[at].items()
        }
        return parts[GRADIENTS], parts.get(PARAMETERS)

    def _put_together(self, at: int) -> dict[int, dict[str, Tensor]]:
        """{column: {stack: the rows of a portion}}, once it has arrived."""
        received = self._pending[at]()
        rows, route, row_cuts = self._plan.incoming[at]
        found = {column: self._zeros(rows) for column in self._flat}
        sources = [*self._sources(route.stay), *received]
        targets: list[Any] = [None] * len(sources)
        for column, stack, places, cuts in row_cuts:
            for i, x in zip(places, cuts.of(found[column][stack].view(-1))):
                targets[i] = x
        _fill(targets, sources)
        return found

    def exchange_updates(self) -> Tensor:
        """See `Transport`. A collective."""
        route, count = self._plan.scatter, len(self._parts.layout.parameters)
        for receive in self._pending:  # also for rows that were not stepped: buffers are reused
            receive()
        sent_dtypes = {(GRADIENTS, i): self._dtype for i in range(count)}
        out, into = self._parts.messages(route, sent_dtypes, HEAD)
        self._messages.append((out, into))
        sending, views = self._buffer(out)
        _fill(views, self._rows_for(out.slots))
        out.put_head(sending, self.status)
        received = self._start_exchange(sending, out, into)()
        sources = [*self._rows_for(route.stay), *received]
        updates: list[Any] = [None] * count
        for part in self._plan.updates:
            flat = torch.empty(sum(part.sizes), dtype=part.dtype, device=self._device)
            _fill(part.cuts.of(flat), [sources[i] for i in part.slots])
            for i, x in zip(part.parameters, torch.split(flat, part.sizes)):
                updates[i] = x
        self.updates = updates
        if self._parts.size == 1:
            return self.status.unsqueeze(0)
        return into.heads(self._buffer(into)[0])

    def repeater(self) -> Callable[[float], Tensor]:
        """See `Transport`."""
        messages, device, group = self._messages, self._device, self._parts.group

        def repeat(word: float) -> Tensor:
            status = torch.zeros(STATUS, dtype=torch.float32, device=device)
            status[0] = word
            for out, into in messages:
                sending, arriving = out.buffer(device), into.buffer(device)
                if out is messages[-1][0]:  # the scatter
                    out.put_head(sending, status)
                all_to_all_into(arriving, into.splits, sending, out.splits, group)
            return into.heads(arriving)

        return repeat

    def _zeros(self, cut: Portion) -> dict[str, Tensor]:
        stacks = self._parts.layout.stacks
        return {
            s: torch.zeros(len(rows), *stacks[s].block, dtype=stacks[s].dtype, device=self._device)
            for s, rows in cut.items()
        }

    def _rows_for(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Views of the updates of these pieces, where the owner has put them."""
        key = id(slots)  # of a route or a message, which last as long as the memory
        if key not in self._memory:
            places = self.places
            views = [as_view(places[s.stack], s.piece.shape, s.piece.rows) for s in slots]
            self._memory[key] = self.sent, views
        return self._memory[key][1]

    def _buffer(self, messages: Messages) -> tuple[Tensor, list[Tensor]]:
        key = id(messages)
        if key not in self._memory:
            with for_keeps():
                buffer = messages.buffer(self._device)
                self._memory[key] = buffer, messages.views(buffer)
        return self._memory[key]

    def _start_exchange(
        self, sending: Tensor, out: Messages, into: Messages, wait: bool = True
    ) -> Callable[[], list[Tensor]]:
        """A function that waits, and returns what the others sent, as views."""
        if self._parts.size == 1:
            return list
        arriving, views = self._buffer(into)
        args = arriving, into.splits, sending, out.splits, self._parts.group
        finish = all_to_all_into(*args, wait=wait)

        def receive() -> list[Tensor]:
            finish()
            return views

        return receive


def _flat(tensors: Sequence[Any]) -> list[Tensor | None]:
    """This rank's part of each, (n,), detached from autograd."""
    held = local_parts(tensors)
    with torch.no_grad():
        return [None if x is None else x.contiguous().view(-1) for x in held]


def _fill(targets: list[Tensor], sources: Sequence[Tensor | None]) -> None:
    """Copy the sources into the targets, cast; zeros where a source is None."""
    pairs = [(a, b) for a, b in zip(targets, sources) if b is not None]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
    for target, source in zip(targets, sources):
        if source is None:
            target.zero_()
