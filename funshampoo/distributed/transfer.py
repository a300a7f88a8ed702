"""The transport of sharded parameters: gradients to the owners, and updates to the holders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.blocks.executor import Leaves
from funshampoo.blocks.portions import Portion
from funshampoo.core.placed import local_part
from funshampoo.distributed.collectives import ProcessGroup, all_to_all_into
from funshampoo.distributed.parts import Parts
from funshampoo.distributed.pieces import as_view
from funshampoo.distributed.routes import GRADIENTS, HEAD, PARAMETERS, Messages, Slot
from funshampoo.distributed.shards import STATUS

Memory = dict[Any, tuple[Tensor, list[Tensor]]]


class TransferForm(NamedTuple):
    """The collectives of a `Transfer`, each as the messages out and those in; a `Form`."""

    gather: tuple[Messages, Messages]
    scatter: tuple[Messages, Messages]
    device: torch.device
    group: ProcessGroup | None

    def met(self, word: float) -> Tensor:
        """See `Form`."""
        status = torch.zeros(STATUS, dtype=torch.float32, device=self.device)
        status[0] = word
        for out, into in (self.gather, self.scatter):
            sending, arriving = out.buffer(self.device), into.buffer(self.device)
            if out is self.scatter[0]:
                out.put_head(sending, status)
            all_to_all_into(arriving, into.splits, sending, out.splits, self.group)
        return into.heads(arriving)


class Transfer:
    """One step's way: two all_to_all_single, of the bytes that have to move; a `Transport`.

    Args:
        leaves: gradients, and parameters where some are shown.
        dtype: of the updates on the way.
        memory: of earlier steps, used again.

    Attributes:
        updates: after `meet`, the updates of this rank's parts in their merged shapes; new tensors.
    """

    def __init__(
        self,
        parts: Parts,
        leaves: Leaves,
        dtype: torch.dtype,
        device: torch.device,
        group: ProcessGroup | None,
        memory: Memory,
    ) -> None:
        self._parts, self._leaves, self._group = parts, leaves, group
        self._routes = parts.routes(leaves.shown)
        self._device, self._dtype, self._memory = device, dtype, memory
        self.status = torch.zeros(STATUS, dtype=torch.float32, device=device)
        stacks = parts.layout.stacks
        shapes = {s: (rows, *stacks[s].block) for s, rows in parts.rows.items()}
        numel = [torch.Size(shape).numel() for shape in shapes.values()]
        if "sent" not in memory:
            memory["sent"] = torch.zeros(sum(numel), dtype=dtype, device=device), []
        self.sent = memory["sent"][0]
        split = torch.split(self.sent, numel)
        self.places = {s: x.view(shape) for (s, shape), x in zip(shapes.items(), split)}
        self._gradients: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] | None = None
        self._ways: list[tuple[Messages, Messages]] = []  # of the collectives that were met
        self.updates: list[Tensor] = []

    def gather(self) -> None:
        """Put the rows of this rank together. All ranks have to come."""
        route, leaves = self._routes.gather, self._leaves
        columns = {GRADIENTS: leaves.gradients, PARAMETERS: leaves.parameters or ()}
        way = {
            (column, i): _dtype_on_the_way(x, leaves, i)
            for column, tensors in columns.items()
            for i, x in enumerate(tensors)
        }
        failure: BaseException | None = None
        flat: dict[tuple[int, int], Tensor | None] = {}

        def find(slot: Slot) -> Tensor | None:
            x = flat[slot.column, slot.parameter]
            return None if x is None else as_view(x, slot.piece.shape, slot.piece.local)

        out, into = self._parts.messages(route, way, 0)
        self._ways = [(out, into)]
        sending, views = self._buffer("gather out", out)
        try:
            for column, tensors in columns.items():
                flat |= {(column, i): _contiguous(x) for i, x in enumerate(tensors)}
            _fill(views, [find(slot) for slot in out.slots])
        except BaseException as error:  # whatever it is: the others are waiting
            failure = error
        came = self._meet("gather in", sending, out, into)
        if failure is not None:
            raise failure
        slots = [*route.stay, *into.slots]
        self._gradients = self._rows()
        self._parameters = None if leaves.shown is None else self._rows()
        found = {GRADIENTS: self._gradients, PARAMETERS: self._parameters or {}}
        targets = [
            as_view(found[slot.column][slot.stack], slot.piece.shape, slot.piece.rows)
            for slot in slots
        ]
        _fill(targets, [*[find(slot) for slot in route.stay], *came])

    def rows_of(self, portion: Portion) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The gradients of these rows of this rank, and their parameters, if any are shown."""

        def part(stacks: dict[str, Tensor]) -> dict[str, Tensor]:
            return {s: stacks[s].narrow(0, r.start, len(r)) for s, r in portion.items()}

        return part(self._gradients), self._parameters and part(self._parameters)

    def meet(self) -> Tensor:
        """See `Transport`. All ranks have to come."""
        route, layout = self._routes.scatter, self._parts.layout
        way = {(GRADIENTS, i): self._dtype for i in range(len(layout.parameters))}
        out, into = self._parts.messages(route, way, HEAD)
        self._ways = [*self._ways, (out, into)]
        sending, views = self._buffer("scatter out", out)

        def find(slot: Slot) -> Tensor:
            return as_view(self.places[slot.stack], slot.piece.shape, slot.piece.rows)

        _fill(views, [find(slot) for slot in out.slots])
        out.put_head(sending, self.status)
        came = self._meet("scatter in", sending, out, into)
        self.updates = [
            torch.empty(held.shape, dtype=self._dtype_of(i), device=self._device)
            for i, held in enumerate(self._parts.held)
        ]
        targets = [
            as_view(self.updates[slot.parameter], slot.piece.shape, slot.piece.local)
            for slot in [*route.stay, *into.slots]
        ]
        _fill(targets, [*[find(slot) for slot in route.stay], *came])
        if self._parts.size == 1:
            return self.status.unsqueeze(0)
        return into.heads(self._buffer("scatter in", into)[0])

    def form(self) -> TransferForm:
        """See `Transport`."""
        gather, scatter = self._ways
        return TransferForm(gather, scatter, self._device, self._group)

    def _rows(self) -> dict[str, Tensor]:
        stacks = self._parts.layout.stacks
        return {
            s: torch.zeros(rows, *stacks[s].block, dtype=stacks[s].dtype, device=self._device)
            for s, rows in self._parts.rows.items()
        }

    def _dtype_of(self, parameter: int) -> torch.dtype:
        regions = self._parts.layout.parameters[parameter].regions
        return self._parts.layout.stacks[regions[0].stack].dtype if regions else torch.float32

    def _buffer(self, name: str, messages: Messages) -> tuple[Tensor, list[Tensor]]:
        key = name, id(messages)
        if key not in self._memory:
            buffer = messages.buffer(self._device)
            self._memory[key] = buffer, messages.views(buffer)
        return self._memory[key]

    def _meet(self, name: str, sending: Tensor, out: Messages, into: Messages) -> list[Tensor]:
        """What the others sent; views."""
        if self._parts.size == 1:
            return []
        arriving, views = self._buffer(name, into)
        all_to_all_into(arriving, into.splits, sending, out.splits, self._group)
        return views


def _contiguous(x: Any) -> Tensor | None:
    return None if x is None else local_part(x).detach().contiguous()


def _dtype_on_the_way(x: Any, leaves: Leaves, i: int) -> torch.dtype:
    """A tensor's own; of a missing gradient the parameter's, which the other ranks' has."""
    dtype: torch.dtype = (leaves.parameters[i] if x is None and leaves.parameters else x).dtype
    return dtype


def _fill(targets: list[Tensor], sources: Sequence[Tensor | None]) -> None:
    """Copy what is there, cast; zeros for what is not."""
    pairs = [(a, b) for a, b in zip(targets, sources) if b is not None]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
    for target, source in zip(targets, sources):
        if source is None:
            target.zero_()
