"""Load a state_dict into the runs of all groups, or raise because it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from funshampoo.core.interrupted import tensors_of
from funshampoo.core.placed import local_part
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects
from funshampoo.distributed.described import Line
from funshampoo.distributed.disagreement import first_difference
from funshampoo.optim.agreement import hyperparameters_of
from funshampoo.optim.another_method import check_not_foreign, told_of_method
from funshampoo.optim.entries import LABEL, is_note, is_shared
from funshampoo.optim.group import GroupRun
from funshampoo.optim.memory import Group, Memory
from funshampoo.optim.ready import Plan, Ready
from funshampoo.optim.saved import Saved, check_fits, check_ours, indices_of, loaded_group
from funshampoo.state.checkpoint import of_run
from funshampoo.state.misfits import MisfitError
from funshampoo.state.parts import Part, part_of

Result = TypeVar("Result")


class Loading(NamedTuple):
    """What the optimizer will continue from, per group; nothing has been changed yet.

    Attributes:
        ready: the states.
        groups: the groups' hyperparameters.
        notes: the clients' notes, by parameter.
    """

    ready: list[Ready]
    groups: list[dict[str, Any]]
    notes: dict[Tensor, dict[str, Any]]


class Checked(NamedTuple):
    """A checkpoint of which everything has been checked that needs no state.

    Attributes:
        steps: (name, value) of the step counters: equal on all ranks that load the same save.
        numbers: the hyperparameters in it, for comparison, as they decide what states are made.
        make: makes the states; of DTensors, a collective.
    """

    steps: set[tuple[str, float]]
    numbers: list[Line]
    make: Callable[[], Loading]


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


def loaded_together(memory: Memory, call: str, check: Callable[[], Checked]) -> Loading:
    """What is loaded. Where ranks share blocks, a collective: all ranks load, or none does.

    They hear of what one rank alone can't load before they make states, which for DTensors they
    make together, and once more when these are filled.

    Args:
        call: the method of the optimizer that all ranks must be in.

    Raises:
        ValueError: another rank could not load what it was given, or was given a part of another
            step or run, or other hyperparameters. Raised on every rank; the failing rank raises
            its own error.
        RuntimeError: other ranks are in a step; or, of DTensors, by the group's timeout, another
            failed while it made its states.
    """
    shared = [group for run in memory.runs for group in run.sharing_groups()]
    if not shared:
        return check().make()
    memory.check_same_call(call)
    checked, everyone = _all_or_none(check, lambda one: one[:2], call, shared[0])
    for rank, (steps, numbers) in enumerate(everyone):
        if steps != everyone[0][0]:
            raise _of_another_save(rank)
        if numbers != everyone[0][1]:
            raise ValueError(
                f"the ranks were given checkpoints that differ: "
                f"{first_difference(everyone[0][1], numbers, rank)}. Give those of one save. "
                "Nothing was changed on any rank."
            )
    found, runs = _all_or_none(checked.make, _runs_of, call, shared[0])
    known = list(map(max, zip(*runs)))
    for rank, own in enumerate(runs):
        # A whole state belongs to no run in particular; one rank may have it, others their parts.
        if any(n not in (0, m) for n, m in zip(own, known)):
            raise _of_another_save(rank)
    ready = [one._replace(state=of_run(one.state, n)) for one, n in zip(found.ready, known)]
    return found._replace(ready=ready)


def _all_or_none(
    act: Callable[[], Result],
    told: Callable[[Result], Any],
    call: str,
    group: ProcessGroup | None,
) -> tuple[Result, list[Any]]:
    """What this rank's act returns, and what all ranks have told of theirs. A collective.

    Raises:
        ValueError: another rank's act failed; the failing rank raises its own error.
    """
    failure: BaseException | None = None
    mine: Any = None
    try:
        result = act()
        mine = told(result)
    except BaseException as error:  # of any kind: the other ranks are waiting
        failure = error
    everyone = gathered_objects((failure is None, mine), group)
    if failure is not None:
        raise failure
    for rank, (succeeded, _) in enumerate(everyone):
        if not succeeded:
            raise ValueError(
                f"rank {rank} of {len(everyone)} could not load what it was given; its own error "
                f"says why. Nothing was changed on any rank. {_REMEDIES[call]}"
            )
    return result, [theirs for _, theirs in everyone]


def _runs_of(found: Loading) -> list[int]:
    return [part_of(one.state).run for one in found.ready]


def _of_another_save(rank: int) -> ValueError:
    return ValueError(
        f"the checkpoint that rank {rank} was given is of another step or run than those "
        "of other ranks: give those of one save. Nothing was changed on any rank."
    )


def _clocks(state: Mapping[Any, Mapping[str, Any]]) -> set[tuple[str, Any]]:
    """The step counters, which are equal in the whole and in all its parts."""
    return {
        (name, x.item())
        for entries in state.values()
        for name, x in entries.items()
        if isinstance(x, Tensor) and not x.ndim and is_shared(name) and name.endswith("/steps")
    }


def checked(
    memory: Memory, groups: Sequence[Group], given: Mapping[str, Any], *, strict: bool, cast: bool
) -> Checked:
    """The states and groups of a checkpoint, once `make` is called.

    Args:
        memory, groups: the optimizer's.
        given: from `given_to`; keyed by number or, as from torch.distributed.checkpoint, full name.
        strict, cast: see `funshampoo.state.load_state_dict`.

    Raises:
        ValueError: names missing or unknown, wrong shapes or dtypes, entries of an AdamW, or only
            one rank's part in a full state dict; by `make` if only a state tells.
    """
    by_name = any(isinstance(index, str) for index in given["state"])
    all_indices = indices_of(given["param_groups"], groups)
    after: list[Group] = []
    entries: list[dict[Tensor, Any]] = []
    plans: list[Plan] = []
    for run, group, saved, indices in zip(memory.runs, groups, given["param_groups"], all_indices):
        own = {
            p: given["state"].get(index, {})
            for p, index in zip(group["params"], indices)
            if index in given["state"] or not by_name
        }
        for each in own.values():
            check_ours(each)
        after.append(loaded_group(saved, group))
        with told_of_method(run, saved, given["state"], (TypeError, ValueError)):
            plans.append(run.planned_load(after[-1], own))
        entries.append(own)

    def make() -> Loading:
        found = Loading([], after, {})
        failures: list[Exception] = []
        each = zip(memory.runs, plans, after, entries, given["param_groups"])
        for run, plan, group, own, saved in each:
            try:
                with told_of_method(run, saved, given["state"], MisfitError):
                    one, notes = run.loaded(plan, group, own, by_name, strict=strict, cast=cast)
                if by_name and strict:
                    _check_read(run, own)
            except Exception as error:  # for later: all ranks make the states of all groups
                failures.append(error)
                continue
            found.ready.append(one)
            found.notes.update(notes)
        if failures:
            raise failures[0]
        if strict:
            check_not_foreign(given["state"])
        return found

    return Checked(_clocks(given["state"]), hyperparameters_of(plans), make)


def _check_read(run: GroupRun, entries: Saved) -> None:
    """Check that a full state dict has the blocks of all ranks.

    torch's helper puts what rank 0 saved into what `state_dict` returns here, and hands in both. So
    a block that rank 0 does not own would silently keep the values that it has. These are still in
    the state's memory, whereas torch.distributed.checkpoint reads all entries into it, or none.

    Raises:
        ValueError: some entries are the state's own, beside those of another rank's part.
    """
    parts = [Part.read(own[LABEL]) for own in entries.values() if LABEL in own]
    if not parts or parts[0].size == 1 or parts[0][:2] == part_of(run.peek())[:2]:
        return
    given = [
        _address(x)
        for own in entries.values()
        for name, x in own.items()
        if isinstance(x, Tensor) and name != LABEL and not is_note(name)
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
