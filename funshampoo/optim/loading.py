"""Load a state_dict, or AdamW's, into the runs of all groups, or find that it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.bare import bare_names
from funshampoo.distributed.collectives import gathered_objects
from funshampoo.distributed.gathering import sharing_groups
from funshampoo.migrate.seeding import seed_from_adamw
from funshampoo.optim.entries import is_shared
from funshampoo.optim.group import GroupRun
from funshampoo.optim.memory import Group, Memory
from funshampoo.optim.ready import Ready
from funshampoo.optim.saved import check_fits, check_ours, indices_of, loaded_group
from funshampoo.optim.vocabulary import check_rate
from funshampoo.state.checkpoint import check, of_run
from funshampoo.state.parts import part_of


class Loading(NamedTuple):
    """What the optimizer goes on from, one entry a group; nothing has been changed yet.

    Attributes:
        ready: the states.
        groups: their hyperparameters.
        notes: what clients have kept with parameters.
    """

    ready: list[Ready]
    groups: list[dict[str, Any]]
    notes: dict[Tensor, dict[str, Any]]


def loaded_together(
    memory: Memory, groups: Sequence[Group], given: Mapping[str, Any], *, strict: bool, cast: bool
) -> Loading:
    """`loaded`, and where ranks share the blocks, on all of them or on none: a collective then.

    Raises:
        ValueError: see `loaded`; or another rank could not load what it was given, or was given a
            part of another step or run. On every rank.
        RuntimeError: other ranks step.
    """
    runs = memory.runs
    shared = [group for run in runs for group in sharing_groups(run.transformation)]
    if not shared:
        return loaded(memory, groups, given, strict=strict, cast=cast)
    memory.meet("load_state_dict")
    failure: BaseException | None = None
    try:
        found = loaded(memory, groups, given, strict=strict, cast=cast)
    except BaseException as error:  # whatever it is: the others are waiting
        failure = error
    steps = set() if failure is not None else _clocks(given["state"])
    numbers = [] if failure is not None else [part_of(one.state).run for one in found.ready]
    everyone = gathered_objects((failure is None, steps, numbers), shared[0])
    if failure is not None:
        raise failure
    known = [max(each) for each in zip(*[numbers for _, _, numbers in everyone])]
    for rank, (well, steps, numbers) in enumerate(everyone):
        if not well:
            raise ValueError(
                f"rank {rank} of {len(everyone)} could not load what it was given; its own error "
                "says why. Nothing was changed on any rank. Give each rank the part that it saved, "
                "or all of them the union, funshampoo.state.merged(parts)."
            )
        # A whole is of no run in particular, and one rank may have it where others have parts.
        if steps != everyone[0][1] or any(n not in (0, m) for n, m in zip(numbers, known)):
            raise ValueError(
                f"the checkpoint that rank {rank} was given is of another step or run than those "
                "of other ranks: give those of one save. Nothing was changed on any rank."
            )
    ready = [one._replace(state=of_run(one.state, n)) for one, n in zip(found.ready, known)]
    return found._replace(ready=ready)


def _clocks(state: Mapping[Any, Mapping[str, Any]]) -> set[tuple[str, Any]]:
    """The counters of steps: equal in the whole and in all its parts."""
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
        memory, groups: of the optimizer.
        given: its state_dict; by number or, as torch.distributed.checkpoint has it, by full name.
        strict, cast: see `funshampoo.state.load_state_dict`.

    Raises:
        ValueError: other groups, names missing or unknown, other shapes or dtypes, AdamW's entries.
    """
    check_fits(given, groups, strict)
    by_name = any(isinstance(index, str) for index in given["state"])
    found = Loading([], [], {})
    all_indices = indices_of(given["param_groups"], groups)
    for run, group, saved, indices in zip(memory.runs, groups, given["param_groups"], all_indices):
        found.groups.append(loaded_group(saved, group))
        entries = {}
        for p, index in zip(group["params"], indices):
            if index in given["state"] or not by_name:
                entries[p] = given["state"].get(index, {})
                check_ours(entries[p])
        one, notes = run.loaded(found.groups[-1], entries, by_name, strict=strict, cast=cast)
        found.ready.append(one)
        found.notes.update(notes)
    return found


def seeded(
    runs: Sequence[GroupRun], saved: Mapping[str, Any], order: Sequence[str] = ()
) -> list[Ready]:
    """The states of all groups with AdamW's moments in them.

    Args:
        runs: of the optimizer.
        saved: AdamW's state_dict(), for the same parameters: by name, where both optimizers were
            given names, else in the same order.
        order: the names of the parameters in their model's order, which is that of an AdamW without
            names, where groups by role have another.

    Raises:
        ValueError: see `funshampoo.state.seed_from_adamw`; or names of parameters differ.
    """
    known = [(i, name) for i, run in enumerate(runs) for name in run.names()]
    if all(run.group.get("param_names") for run in runs):
        known = _in_their_order(known, saved, order)
    ready = []
    for i, run in enumerate(runs):
        # Two groups may use the same name: only this one's are its own.
        own = [name if i == j else f"group {j}/{name}" for j, name in known]
        ready.append(run.with_state(seed_from_adamw(run.state(), saved, own)))
    for one in ready:
        check(one.state)
    return ready


def rates_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler has written to a saved group.

    Raises:
        TypeError, ValueError: a rate that is no single number.
    """
    found = {name: copy.deepcopy(saved[name]) for name in ("lr", "initial_lr") if name in saved}
    for rate in found.values():
        check_rate(rate)
    return found


def _in_their_order(
    known: list[tuple[int, str]], saved: Mapping[str, Any], order: Sequence[str]
) -> list[tuple[int, str]]:
    """(group, name) of each parameter, as the AdamW has them."""
    groups = saved["param_groups"]
    theirs = list(order)
    if all("param_names" in group for group in groups):
        theirs = [name for group in groups for name in group["param_names"]]
    elif len(order) != sum(len(group["params"]) for group in groups):
        return known
    theirs, ours = bare_names(theirs), bare_names(name for _, name in known)
    by_name = dict(zip(ours, known))
    if theirs == ours or len(by_name) < len(known):
        return known
    if missing := sorted(by_name.keys() ^ set(theirs)):
        where = "this optimizer" if missing[0] in by_name else "the AdamW"
        raise ValueError(f"'{missing[0]}' is a parameter of {where} alone.")
    return [by_name[name] for name in theirs]
