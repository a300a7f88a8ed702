"""Checkpoints: a state as a flat mapping of names to tensors, and back.

The names are those of `naming`. They do not depend on stacks or ranks, so a checkpoint of N ranks,
the union of their parts, loads on M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.modes import for_keeps
from funshampoo.core.wholes import placed_as
from funshampoo.operators.packed import in_form_of
from funshampoo.state.meaning import kind_of
from funshampoo.state.misfits import MisfitError, blocks_differ, listed, misfit, report
from funshampoo.state.naming import Named, entries_of, named, owned_elsewhere
from funshampoo.state.nodes import check_is_state, check_kind, walk
from funshampoo.state.parts import PART_KEY, RUN, Part, bits_of, is_note, part_of
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import WrappedState
from funshampoo.state.values import problems

FORMAT = 2
FORMAT_KEY = "funshampoo/format"
_CLOCK_OF_SHARDED = "sharded/steps"


class Loaded(NamedTuple):
    """What `load_state_dict` returns.

    Attributes:
        state: the state with the saved values.
        missing: names that the state has and the checkpoint lacks; they keep the values of the
            state passed in.
        unknown: names in the checkpoint for which the state has no place.
    """

    state: Any
    missing: list[str]
    unknown: list[str]


def state_dict(state: Any) -> dict[str, Tensor]:
    """A state as {name: tensor}: flat, readable by torch.load(weights_only=True) and safetensors.

    Args:
        state: of any transformation. For a sharded one, this rank's part: every rank saves its own,
            and `merged` unites them.

    Returns:
        Views of the state's tensors, not copies, detached. Also, int64 on the CPU: this format's
        version, 0-dimensional, under "funshampoo/format"; and under "funshampoo/part" [rank, ranks,
        a sum of all bits], by which `merged` recognizes parts of one state; if ranks share, the
        second also contains 2^20 times their run number. The sum reads the whole state.

    Raises:
        TypeError: not a state.
        ValueError: two tensors would have the same name; says which. Give stages different names.

    >>> import torch
    >>> from funshampoo import blocked, trace
    >>> saved = state_dict(blocked(trace(0.9), max_size=2).init({"w": torch.zeros(3)}))
    >>> {name: tuple(x.shape) for name, x in saved.items() if name.startswith("w")}
    {'w/block_0/buffer': (2,), 'w/block_1/buffer': (1,)}
    >>> saved["funshampoo/format"], saved["funshampoo/part"]
    (tensor(2), tensor([0, 1, 0]))
    """
    check_is_state(state)
    entries = named(state)
    part = part_of(state)._replace(bits=bits_of(entry.x for entry in entries))
    notes = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu"), PART_KEY: part.entry()}
    own = {entry.name: entry.x for entry in entries}
    return {**notes, **{n: x.detach() if x.requires_grad else x for n, x in own.items()}}


@for_keeps()
def load_state_dict(
    state: Any, saved: Mapping[str, Tensor], *, strict: bool = True, cast: bool = False
) -> Loaded:
    """A state like `state` with the values of a checkpoint, on the devices of `state`.

    Everything is checked before anything is built, and nothing passed in is written to.

    Args:
        state: a fresh tx.init(params), which sets the structure. Each rank passes its own.
        saved: from `state_dict`, on any number of ranks, see `merged`; or, on the same number of
            ranks, the part that this rank saved.
        strict: a missing or unknown name is an error. False reports it instead.
        cast: convert floating-point values to the dtypes of `state`; otherwise another dtype is an
            error.

    A checkpoint does not contain the chain's numbers: rates, decays and intervals are the new
    chain's. So is the solver: a different one takes over at the next refresh. Packed factor
    matrices and roots are unpacked if `state` has them unpacked, and vice versa. Another block size
    changes the blocks' shapes, which is an error that says so.

    Raises:
        ValueError: names missing or unknown (all are listed), another shape or dtype, another
            version of the format; values that no run can have produced, see `check`. These are
            checked, `strict` or not, for every name with a place in the state of some rank.

    >>> import torch
    >>> from funshampoo import trace
    >>> tx, params = trace(0.9), {"w": torch.zeros(2)}
    >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> load_state_dict(tx.init(params), state_dict(state)).state
    TraceState(buffer={'w': tensor([1., 1.])}, seen=())
    """
    check_kind(state)
    fit = _fit(state, saved, strict, cast)
    wrong = problems(fit.entries, _limit(state, fit.entries))
    if wrong:
        raise ValueError(
            f"the checkpoint has values that no run can have left; nothing was changed.\n"
            f"{listed(wrong)}\nThe file is damaged, or the run had gone wrong before "
            "it was saved: load an earlier one."
        )
    new = of_run(_filled(state, fit.saved), fit.run)
    if fit.missing:  # perhaps including the clock
        new = _cut(new)
    return Loaded(new, fit.missing, fit.unknown)


def of_run(state: Any, run: int) -> Any:
    """The state, marked as one of this run."""
    if not run:
        return state

    def adopted(place: Place, x: Tensor) -> Tensor:
        return torch.full_like(x, run) if place.path[-2:] == RUN else x

    return map_tensors(adopted, state)


@for_keeps()
def carried_over(state: Any, entries: Mapping[str, Tensor]) -> Any:
    """A state like `state` with the entries that fit, from states of this process.

    They can't have been damaged, so values are not checked, and no device is waited for. For blocks
    from a state whose clock is ahead, counts are capped at this state's clock.

    Args:
        entries: {name: tensor}, from `named_tensors` or `state_dict`.

    Raises:
        ValueError: other shapes.
    """
    entries = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu"), **entries}
    return _cut(_filled(state, _fit(state, entries, strict=False, cast=True).saved))


def _cut(new: Any) -> Any:
    """The state, with all counts capped at its clock."""
    limit = _limit(new, named(new))

    def cut(place: Place, x: Tensor) -> Tensor:
        is_count = kind_of(place.kind, place.field).startswith("count")
        return x.clamp(max=limit) if is_count and limit is not None else x

    return map_tensors(cut, new)


def check(state: Any) -> None:
    """Check a state: raise if its values can't come from any run. Waits for the device.

    Unless a stage declares it otherwise (see `meaning`), that is: NaN or infinity anywhere but in
    reports; negative counts, weights, second moments and diagonals of factor matrices; weights
    above 1; an entry of a factor matrix with |L_ij| > 2 √(L_ii L_jj); a count above the clock, a
    streak above its count. Wrong but possible values are not detected.

    Raises:
        TypeError: not a state.
        ValueError: lists the names, and what is wrong with each.

    >>> import torch
    >>> from funshampoo import trace
    >>> check(trace(0.9).init({"w": torch.tensor([1.0])}))
    """
    check_is_state(state)
    entries = named(state)
    wrong = problems(entries, _limit(state, entries))
    if wrong:
        raise ValueError(f"the state has values that no run can have left.\n{listed(wrong)}")


class _Fit(NamedTuple):
    """A checkpoint with the names, shapes and dtypes of a state.

    Attributes:
        saved: packed or unpacked as in the state.
        entries: those with a place here or on another rank.
        run: its run number; 0 if it has none.
    """

    saved: Mapping[str, Tensor]
    entries: list[Named]
    missing: list[str]
    unknown: list[str]
    run: int


def _fit(state: Any, saved: Mapping[str, Tensor], strict: bool, cast: bool) -> _Fit:
    _check_format(saved)
    part = Part.read(saved[PART_KEY]) if PART_KEY in saved else None
    places = {entry.name: entry for entry in named(state)}
    saved = _with_clock(_repacked(saved, places), places)
    missing = [name for name in places if name not in saved]
    foreign = [name for name in saved if name not in places and not is_note(name)]
    elsewhere = dict.fromkeys(owned_elsewhere(state), False)  # are blocks of other ranks there?
    owners = {name: _owner(name, elsewhere) for name in foreign}
    elsewhere |= dict.fromkeys([owner for owner in owners.values() if owner], True)
    unknown = [name for name, owner in owners.items() if not owner]
    if part is None or part[:2] != part_of(state)[:2]:  # else the other ranks have their own
        missing += [f"{prefix}/..." for prefix, there in elsewhere.items() if not there]
    misfits = [
        problem
        for name, place in places.items()
        if name in saved and (problem := misfit(name, place.x, saved[name], cast))
    ]
    if misfits or (strict and (missing or unknown)):
        lists = misfits, missing if strict else [], unknown if strict else []
        whole = part is None or part.size == 1
        differ = blocks_differ([*places, *elsewhere], saved, whole)
        raise MisfitError(report(*lists, part, differ))
    entries = [place._replace(x=saved[name]) for name, place in places.items() if name in saved]
    kinds = {place.path: place.kind for place in places.values()}
    for name, owner in owners.items():  # so that all ranks refuse what one of them must
        x, path = saved[name], name[len(owner) + 1 :]
        if owner and path in kinds and isinstance(x, Tensor):
            entries.append(Named(owner, path, path, kinds[path], x, x.dtype))
    return _Fit(saved, entries, missing, unknown, 0 if part is None else part.run)


def _filled(state: Any, saved: Mapping[str, Tensor]) -> Any:
    """A state like `state`, with values from `saved` where it has them."""

    def filled(place: Place, x: Tensor) -> Tensor:
        wanted = entries_of(place, x)
        if not wanted:
            return x
        if place.stack is None or x.ndim == 0:  # one per stack: any block's will do
            found = next((saved[one.name] for one in wanted if one.name in saved), x)
            return placed_as(x, found)
        new = torch.empty_like(x, memory_format=torch.contiguous_format)
        for row, entry in zip(new, wanted):
            row.copy_(saved.get(entry.name, entry.x))
        return new

    return map_tensors(filled, state)


def _limit(state: Any, entries: Sequence[Named]) -> int | None:
    """The upper limit of all counts: the clock. None without one, or if something may tick faster.

    Combinators from outside funshampoo may step their part more than once per step.
    """
    for _, node in walk(state):
        ours = type(node).__module__.startswith("funshampoo.")
        faster = isinstance(node, WrappedState) and "once" not in node.pace
        if faster or (hasattr(node, "_fields") and not ours):
            return None
    clocks = [entry.x for entry in entries if entry.kind == "steps" and not entry.x.is_meta]
    steps = max((int(x.max()) for x in clocks), default=-1)
    return steps if steps >= 0 else None


def _owner(name: str, elsewhere: Mapping[str, Any]) -> str:
    """The block or leaf of another rank that a name belongs to; "" if none."""
    steps = name.split("/")
    prefixes = ("/".join(steps[:i]) for i in range(1, len(steps)))
    return next((prefix for prefix in prefixes if prefix in elsewhere), "")


def _check_format(saved: Mapping[str, Tensor]) -> None:
    version = saved.get(FORMAT_KEY)
    if version is None:
        raise ValueError(
            f"this is no checkpoint of funshampoo: it lacks '{FORMAT_KEY}'. Pass what "
            "funshampoo.state.state_dict returned."
        )
    if not isinstance(version, Tensor) or version.ndim or version.dtype != torch.int64:
        raise ValueError(f"'{FORMAT_KEY}' is no int64 of shape (): the checkpoint is damaged.")
    if int(version) != FORMAT:
        raise ValueError(
            f"the checkpoint has format {int(version)}; this release of funshampoo reads {FORMAT}."
        )


def _repacked(saved: Mapping[str, Tensor], places: Mapping[str, Named]) -> dict[str, Tensor]:
    """The checkpoint, with symmetric matrices packed or unpacked as in the state."""
    return {
        name: in_form_of(x, places[name].x)
        if name in places and _is_symmetric(name) and isinstance(x, Tensor)
        else x
        for name, x in saved.items()
    }


def _with_clock(saved: dict[str, Tensor], places: Mapping[str, Named]) -> dict[str, Tensor]:
    """The checkpoint with its clock where the state has its own.

    Outside of blocks `sharded` counts in place of what is in it, and even if nothing there does.
    """
    ours = [name for name, x in places.items() if x.kind == "steps" and name not in saved]
    theirs = [name for name in saved if name.endswith("/steps") and name not in places]
    if len(theirs) != 1 or len(ours) > 1 or _CLOCK_OF_SHARDED not in (*ours, *theirs):
        return saved
    steps = saved.pop(theirs[0])
    return saved | dict.fromkeys(ours, steps)


def _is_symmetric(name: str) -> bool:
    """Whether it may be packed: a factor matrix, ".../factors/0", or kept, ".../kept/0/value/0"."""
    return ["", *name.split("/")][-2] in ("factors", "value")
