"""What all ranks must have in common, and when they compare it.

A rank's step is useful to the others only if all do the same, on the same parameters in the same
order. This is checked where it costs next to nothing on an ordinary step:

- before the first step with these parameters, by gathering six integers (`Agreement`): everything
  constant, what this step does, and the order of the parameters and of the gradients, by value;
- on every step, in the status sent with the updates: everything constant, live numbers, the step
  number (`fingerprint_of`, `context_lines`).

If something differs, every rank sees it, and a second gather brings each rank's data for the
message. A rank that must compare again, because it steps something other than before, first says so
in the other ranks' step (`disagreement_error`).
"""

from __future__ import annotations

import functools
import hashlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.blocks.executor import Leaves
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation
from funshampoo.core.placed import is_in_parts, local_part
from funshampoo.distributed.collectives import ProcessGroup, all_gather_into
from funshampoo.distributed.described import Line, described
from funshampoo.distributed.disagreement import (
    Bits,
    PreviousStep,
    RankStatus,
    announce_change,
    disagreement_error,
)
from funshampoo.distributed.shards import Shards
from funshampoo.state.parts import sum_of_bits


def leaf_lines(leaves: Leaves) -> list[Line]:
    """Names, shapes and dtypes."""
    known = leaves.gradients if leaves.parameters is None else leaves.parameters
    found = [("the number of parameters", str(len(leaves.names)))]
    for i, (name, x) in enumerate(zip(leaves.names, known)):
        shape = "" if x is None else f", {tuple(x.shape)}, {x.dtype}"
        found.append((f"parameter {i}", f"'{name}'{shape}"))
    return found


def gradient_dtype_lines(leaves: Leaves) -> list[Line]:
    """The dtypes of sharded gradients, which determine the message lengths, even of missing ones.

    A missing gradient gets room in its parameter's dtype: if another rank has the gradient in
    another dtype, both must learn of it before they send anything.
    """
    known = zip(leaves.names, leaves.gradients, leaves.parameters or ())
    return [
        (f"the dtype of the gradient of '{name}'", str((p if g is None else g).dtype))
        for name, g, p in known
        if is_in_parts(p)
    ]


def fingerprint_of(lines: Any, bits: int = 62) -> int:
    """A fingerprint with this many bits, the same in every process.

    >>> 0 <= fingerprint_of([("every", "10")], bits=24) < 2**24
    True
    """
    digest = hashlib.blake2b(repr(lines).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)


def context_lines(context: Context) -> list[Line]:
    """What the caller passes to this step; for a number on a device, only its presence.

    Reading its value would wait for the device.
    """
    found = [("refresh", str(context.refresh))] if context.refresh is not None else []
    for name, x in sorted(context.hyper.items()):
        if isinstance(x, Tensor):
            x = x.tolist() if x.device.type == "cpu" else "on a device"
        found.append((name, repr(float(x) if isinstance(x, (int, float)) else x)))
    return found


def bits_of(leaves: Sequence[Tensor | None]) -> list[int]:
    """One number per leaf: the sum of its elements' bits as integers, exact in any order.

    0 for a DTensor, since ranks hold different parts of it. Waits for the device.
    """
    found = [sum_of_bits(x) for x in leaves if x is not None and not is_in_parts(x)]
    numbers = iter(torch.stack(found).tolist() if found else [])
    return [-1 if x is None else 0 if is_in_parts(x) else next(numbers) for x in leaves]


def content_of(leaves: Leaves) -> int:
    """A fingerprint of the bits of local gradients and parameters, at least 1 and below 2^24, which
    float32 holds exactly. Waits for the device.
    """
    here = [x for x in (*leaves.gradients, *(leaves.parameters or ())) if x is not None]
    found = [sum_of_bits(local_part(x)) for x in here]
    return fingerprint_of(torch.stack(found).tolist() if found else [], 24) | 1


class Caller(Protocol):
    """What surrounds a chain without its knowledge, such as the wrapper.

    Attributes:
        fingerprint: that of `lines`.
    """

    fingerprint: int

    def lines(self) -> list[Line]:
        """What must be the same on all ranks, besides the chain and its numbers."""

    def description(self) -> list[Line]:
        """Everything that is stepped, under the caller's names, as it is now."""


class Agreement:
    """The plans on which all ranks of a group have agreed, for one `sharded`.

    Args:
        inner: the transformation it runs.
        group: the ranks.
        options: its own arguments, {name: value}.

    Attributes:
        caller: what surrounds the chain; None for plain functions.
    """

    def __init__(
        self, inner: GradientTransformation, group: ProcessGroup | None, options: Mapping[str, Any]
    ) -> None:
        self._inner, self._group, self._options = inner, group, options
        self._known_group: Any = lambda: None
        self._lines: list[Line] = []
        self.caller: Caller | None = None
        self.reset()

    def reset(self) -> None:
        """Make the ranks agree again on the next step. All of them must do so."""
        self._previous_step: PreviousStep | None = None
        self._agreed: set[int] = set()
        self._last_agreed: tuple[Any, ...] = (None, None, None, 0)

    def previous_step(self) -> PreviousStep | None:
        """The previous step in this group, which other ranks may be about to repeat."""
        return self._previous_step if self._known_group() is self._current_group() else None

    def _current_group(self) -> Any:
        """The group; "all ranks" is a new one if torch.distributed was initialized again."""
        return self._group or dist.group.WORLD

    def record_step(self, step: PreviousStep) -> None:
        """Remember the step, to take part in its collectives again."""
        self._previous_step = step

    def announce_change(self, leaves: Leaves, context: Context) -> None:
        """Tell the ranks, if there was a previous step, that this one now steps other leaves.

        Raises:
            RuntimeError: not all of them do; on every rank.
        """
        step = self.previous_step()
        if step is not None:
            announce_change([step], lambda: self._description(leaves, context), self._group)
            self._previous_step = None

    def _agreed_fingerprint(
        self, shards: Shards, leaves: Leaves, context: Context, device: torch.device
    ) -> int:
        """The fingerprint of everything constant, `lines`, on which the ranks agree.

        The first time for these leaves it is a collective. Ranks that switch between leaves on
        which they have agreed, as with two models, do not announce it: if only some switch, they
        meet in two mismatched collectives, with torch.distributed's error, or its timeout.

        Raises:
            RuntimeError: something differs, or another rank failed here; on every rank.
        """
        now = self._current_group()
        known = self._known_group() is now
        before, where, names, plan = self._last_agreed
        if known and before is shards and where == leaves.where and names == leaves.names:
            return int(plan)
        if not known:
            self._known_group = weakref.ref(now)
            self.reset()
        lines = [*self._plan_lines(leaves), *_owner_lines(shards)]
        plan = fingerprint_of(lines)
        if plan not in self._agreed:
            self.announce_change(leaves, context)
            check_ranks_agree([*lines, *self._caller_lines()], leaves, context, self._group, device)
            self._agreed.add(plan)
        self._lines = lines
        self._last_agreed = shards, leaves.where, leaves.names, plan
        return plan

    def rank_status(
        self,
        shards: Shards,
        leaves: Leaves,
        context: Context,
        device: torch.device,
        run: int,
        missing: Sequence[str] = (),
    ) -> RankStatus:
        """This rank's report on a step. On their first step, the ranks agree on it here.

        Args:
            run: the number of the run that the state belongs to; 0 on its first step.
            missing: gradients that must be missing on all ranks.

        Raises:
            RuntimeError: something differs, or another rank failed here; on every rank.
        """
        plan = self._agreed_fingerprint(shards, leaves, context, device)

        def lines() -> list[Line]:
            of_run = ("the run that the state is of", f"{run:x}" if run else "new")
            gone = ("the gradients that are missing", ", ".join(missing) or "none")
            return [*self._lines, of_run, *self._caller_lines(), *context_lines(context), gone]

        gone = fingerprint_of(missing) if missing else 0
        caller = 0 if self.caller is None else self.caller.fingerprint
        fingerprint = fingerprint_of((plan ^ run ^ gone, caller, context_lines(context)), 24)
        content = 0 if run else content_of(leaves)
        description = functools.partial(self._description, leaves, context)
        return RankStatus(fingerprint, context.step or 0, content, lines, description)

    def _description(self, leaves: Leaves, context: Context) -> list[Line]:
        if self.caller is not None:
            return self.caller.description()
        own = self._plan_lines(leaves), gradient_dtype_lines(leaves), context_lines(context)
        return [line for lines in own for line in lines]

    def _caller_lines(self) -> list[Line]:
        return [] if self.caller is None else self.caller.lines()

    def _plan_lines(self, leaves: Leaves) -> list[Line]:
        return [*leaf_lines(leaves), *self._chain_lines]

    @functools.cached_property
    def _chain_lines(self) -> list[Line]:
        own = [(name, repr(value)) for name, value in self._options.items()]
        return own + described(self._inner)


def check_ranks_agree(
    lines: list[Line],
    leaves: Leaves,
    context: Context,
    group: ProcessGroup | None,
    device: torch.device,
) -> None:
    """Compare with all ranks.

    Raises:
        RuntimeError: something differs, or another rank failed here; on every rank.
    """
    failure: BaseException | None = None
    lines_here: list[Line] = []
    bits = Bits([], [])
    row = [1, 0, 0, 0, 0, 0]
    try:
        lines_here = [*lines, ("the number of the step", str(context.step))]
        lines_here += [*context_lines(context), *gradient_dtype_lines(leaves)]
        bits = Bits(bits_of(leaves.parameters or ()), bits_of(leaves.gradients))
        row = [0, fingerprint_of(lines_here)]
        row += [fingerprint_of(x) for own in bits for x in (sorted(own), own)]
    except BaseException as error:  # of any type: the other ranks are waiting
        failure = error
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    table = mine.new_empty(dist.get_world_size(group) * len(row))
    all_gather_into(table, mine, group)
    rows = [tuple(found) for found in table.view(-1, len(row)).tolist()]
    if failure is not None:
        raise failure
    failed = [rank for rank, found in enumerate(rows) if found[0]]
    if failed:
        raise RuntimeError(
            f"sharded: rank {failed[0]} of {len(rows)} failed before the first step; its own error "
            "says why. Nothing was moved."
        )
    # Values may differ, though they should not: a gradient was not averaged, or has a NaN. But if
    # the same values come in another order, that is no accident.
    reordered = any(len({r[i : i + 2] for r in rows}) > len({r[i] for r in rows}) for i in (2, 4))
    if reordered or len({row[1] for row in rows}) > 1:
        raise disagreement_error(lines_here, group, bits, leaves.names)
    other = next((rank for rank, found in enumerate(rows) if found[2] != rows[0][2]), None)
    if other is not None:
        warnings.warn(
            f"sharded: the parameters are not the same on rank 0 and on rank {other}: every rank "
            "adds the same updates to its own. Begin with equal ones, as DistributedDataParallel "
            "makes them.",
            stacklevel=2,
        )


def _owner_lines(shards: Shards) -> list[Line]:
    """Which rows each rank owns."""
    return [
        (f"the owner of blocks of {piece.stack}", f"rank {piece.owner} of rows {piece.all_rows}")
        for piece in shards.pieces
    ]
