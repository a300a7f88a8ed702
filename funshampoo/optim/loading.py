"""Load a state_dict into the runs of all groups, or raise because it does not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.interrupted import tensors_of
from funshampoo.core.placed import local_part
from funshampoo.distributed.collectives import gathered_objects
from funshampoo.distributed.gathering import sharing_groups
from funshampoo.optim.entries import SHARED, is_note, is_shared
from funshampoo.optim.group import GroupRun
from funshampoo.optim.memory import Group, Memory
from funshampoo.optim.ready import Ready
from funshampoo.optim.saved import Saved, check_fits, check_ours, indices_of, loaded_group
from funshampoo.state.checkpoint import of_run
from funshampoo.state.parts import PART_KEY, Part, part_of


class Loading(NamedTuple):
    """What the optimizer will continue from, per group; nothing has been changed yet.

    Attributes:
        ready: the states.
        groups: the groups' hyperparameters.
        notes: the clients' notes, by parameter.
        steps: (name, value) of the step counters: equal on all ranks that load the same save.
    """

    ready: list[Ready]
    groups: list[dict[str, Any]]
    notes: dict[Tensor, dict[str, Any]]
    steps: set[tuple[str, float]]


_REMEDIES = {
    "load_state_dict": "Give each rank the part that it saved, or all of them the union, "
    "funshampoo.state.merged(parts).",
    "seed_from_adamw": "Give all ranks the same.",
}


def given_to(optimizer: Any, state_dict: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """A state_dict after the pre-hooks of this optimizer.

    Raises:
        TypeError: it is not a mapping.
        ValueError: it does not fit, see `check_fits`.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {state_dict!r:.80}; give what state_dict() returned.")
    given: Any = dict(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = before(optimizer, given)
        given = given if replaced is None else replaced
    check_fits(given, optimizer.param_groups, strict)
    return given  # type: ignore[no-any-return]


def loaded_together(memory: Memory, call: str, load: Callable[[], Loading]) -> Loading:
    """What `load` returns. Where ranks share blocks, a collective: all ranks load, or none does.

    Args:
        call: the method of the optimizer that all ranks must be in.

    Raises:
        ValueError: another rank could not load what it was given, or was given a part of another
            step or run. Raised on every rank; the failing rank raises what `load` raised.
        RuntimeError: other ranks are in a step; or, of DTensors, by the group's timeout, another
            could not make its states.
    """
    shared = [group for run in memory.runs for group in sharing_groups(run.transformation)]
    if not shared:
        return load()
    memory.check_same_call(call)
    failure: BaseException | None = None
    steps: set[tuple[str, float]] = set()
    numbers: list[int] = []
    try:
        found = load()
        steps, numbers = found.steps, [part_of(one.state).run for one in found.ready]
    except BaseException as error:  # of any kind: the other ranks are waiting
        failure = error
    everyone = gathered_objects((failure is None, steps, numbers), shared[0])
    if failure is not None:
        raise failure
    known = [max(each) for each in zip(*[numbers for _, _, numbers in everyone])]
    for rank, (succeeded, steps, numbers) in enumerate(everyone):
        if not succeeded:
            raise ValueError(
                f"rank {rank} of {len(everyone)} could not load what it was given; its own error "
                f"says why. Nothing was changed on any rank. {_REMEDIES[call]}"
            )
        # A whole state belongs to no run in particular; one rank may have it, others their parts.
        if steps != everyone[0][1] or any(n not in (0, m) for n, m in zip(numbers, known)):
            raise ValueError(
                f"the checkpoint that rank {rank} was given is of another step or run than those "
                "of other ranks: give those of one save. Nothing was changed on any rank."
            )
    ready = [one._replace(state=of_run(one.state, n)) for one, n in zip(found.ready, known)]
    return found._replace(ready=ready)


def _clocks(state: Mapping[Any, Mapping[str, Any]]) -> set[tuple[str, Any]]:
    """The step counters, which are equal in the whole and in all its parts."""
    return {
        (name, x.item())
        for entries in state.values()
        for name, x in entries.items()
        if isinstance(x, Tensor) and not x.ndim and is_shared(name) and name.endswith("/steps")
    }


def loaded(
    memory: Memory, groups: Sequence[Group], given: Mapping[str, Any], *, strict: bool, cast: bool
) -> Loading:
    """The states and groups of a checkpoint.

    Args:
        memory, groups: the optimizer's.
        given: from `given_to`; keyed by number or, as from torch.distributed.checkpoint, full name.
        strict, cast: see `funshampoo.state.load_state_dict`.

    Raises:
        ValueError: names missing or unknown, wrong shapes or dtypes, entries of an AdamW, or only
            one rank's part in a full state dict.
    """
    by_name = any(isinstance(index, str) for index in given["state"])
    found = Loading([], [], {}, _clocks(given["state"]))
    all_indices = indices_of(given["param_groups"], groups)
    failures: list[Exception] = []
    for run, group, saved, indices in zip(memory.runs, groups, given["param_groups"], all_indices):
        found.groups.append(loaded_group(saved, group))
        entries = {}
        for p, index in zip(group["params"], indices):
            if index in given["state"] or not by_name:
                entries[p] = given["state"].get(index, {})
        with _later(failures):
            for own in entries.values():
                check_ours(own)
        with _later(failures):
            one, notes = run.loaded(found.groups[-1], entries, by_name, strict=strict, cast=cast)
            if by_name and strict:
                _check_read(run, entries)
            found.ready.append(one)
            found.notes.update(notes)
    if failures:
        raise failures[0]
    return found


@contextlib.contextmanager
def _later(failures: list[Exception]) -> Iterator[None]:
    """A context that keeps an error for later, since ranks make states of DTensors together.

    So entries that do not fit, on one rank, keep no other waiting. What fails before a state is
    made does: a hyperparameter out of range, on this rank alone.
    """
    try:
        yield
    except Exception as error:
        failures.append(error)


def _check_read(run: GroupRun, entries: Saved) -> None:
    """Check that a full state dict has the blocks of all ranks.

    torch's helper puts what rank 0 saved into what `state_dict` returns here, and hands in both. So
    a block that rank 0 does not own would silently keep the values that it has. These are still in
    the state's memory, whereas torch.distributed.checkpoint reads all entries into it, or none.

    Raises:
        ValueError: some entries are the state's own, beside those of another rank's part.
    """
    label = SHARED + PART_KEY
    parts = [Part.read(own[label]) for own in entries.values() if label in own]
    if not parts or parts[0].size == 1 or parts[0][:2] == part_of(run.peek())[:2]:
        return
    given = [
        _address(x)
        for own in entries.values()
        for name, x in own.items()
        if isinstance(x, Tensor) and name != label and not is_note(name)
    ]
    here = {_address(x) for x in tensors_of(run.peek())}
    kept = [address in here for address in given if address]  # none: of nothing
    if any(kept) and not all(kept):
        raise ValueError(
            f"the full state dict has the part of rank {parts[0].rank} of {parts[0].size} only; "
            "nothing was changed. It is whole if the optimizer that saves it was made with "
            "consolidate=True; or save without full_state_dict."
        )


def _address(x: Tensor) -> int:
    """Where the memory begins that the tensor, or this rank's part of it, is a view of."""
    return local_part(x).untyped_storage().data_ptr()
