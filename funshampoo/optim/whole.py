"""What is remembered of the parameters by this rank, or by all ranks that share the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from funshampoo.core.placed import is_in_parts
from funshampoo.distributed.gathering import all_succeeded, collected, without_parts
from funshampoo.optim.entries import LABEL
from funshampoo.optim.group import GroupRun
from funshampoo.optim.memory import Memory
from funshampoo.state.parts import Part, merged, part_of

Entries = dict[Any, dict[str, Any]]  # {number of a parameter: what is remembered of it}


class WholeEntries:
    """The entries of all ranks together, for as long as they are current.

    Args:
        memory: this rank's, as it is now.
        entries: those of all ranks.
    """

    def __init__(self, memory: Memory, entries: Entries) -> None:
        self.entries = entries
        self._made = _stamp(memory)

    def is_current(self, memory: Memory) -> bool:
        """Whether the entries are those of the states as they are now."""
        now, then = _stamp(memory), self._made
        return now[0] == then[0] and len(now) == len(then) and all(map(is_, now[1:], then[1:]))


def _stamp(memory: Memory) -> list[Any]:
    """A stamp that changes with whatever is saved: groups, writes, and states by identity."""
    snapshots = [run.snapshot() for run in memory.runs]
    return [(memory.writes, snapshots), *[run.state() for run in memory.runs]]


def numbers_of(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, int]:
    """The number of every parameter, counted over all groups."""
    index: dict[Tensor, int] = {}
    for i, p in enumerate([p for group in groups for p in group["params"]]):
        index.setdefault(p, i)
    return index


def part_of_this_rank(memory: Memory, index: Mapping[Tensor, int]) -> Entries:
    """What this rank remembers, labelled with which part of the whole it is.

    Args:
        index: the number of every parameter.
    """
    memory.apply_edits()
    found = {i: memory.entries_of(p) for p, i in index.items()}
    found = {i: entries for i, entries in found.items() if entries}
    for run in memory.runs:
        _label(run, found, index, part_of(run.state()))
    return found


def entries_of_all_ranks(
    memory: Memory, index: Mapping[Tensor, int], to: int | None
) -> Entries | None:
    """The entries of all ranks together; None on ranks that do not get them. A collective.

    Args:
        index: the number of every parameter.
        to: the rank that gets it; None: every rank. Every rank also gets it where no blocks are
            sharded, as for AdamW on DTensors.

    Raises:
        NotImplementedError: the parameter groups are sharded over different process groups.
        RuntimeError: another rank could not collect its entries.
    """
    memory.check_same_call("consolidate_state_dict")
    groups = [group for run in memory.runs for group in run.sharing_groups()]
    if any(group is not groups[0] for group in groups):
        raise NotImplementedError(
            "the parameter groups share out their blocks over different process groups: save "
            "every rank's state_dict and merge them (funshampoo.state.merged)."
        )
    sharded: list[Any] = [p for p in index if is_in_parts(p)]
    meshes = [p.device_mesh for p in sharded]
    found: Entries = {}
    failure: Exception | None = None
    try:
        found = part_of_this_rank(memory, index)
    except Exception as error:  # the other ranks are waiting
        failure = error
    succeeded = all_succeeded(meshes, failure is None)
    if meshes and succeeded:
        found = without_parts(found)
    parts = collected(groups[0], found if succeeded else None, to) if groups else None
    if failure is not None:
        raise failure
    if not succeeded:
        raise RuntimeError("another rank could not say what it has; its own error says why.")
    if groups:
        if parts is None:
            return None
        if None in parts:
            raise RuntimeError(
                f"rank {parts.index(None)} could not say what it has; its own error says why."
            )
        found = merged(parts)
    for run in memory.runs:
        _label(run, found, index, Part(0, 1))
    return found


def _label(run: GroupRun, found: Entries, index: Mapping[Tensor, int], part: Part) -> None:
    """Label the first parameter of a group with which part of its state this is."""
    first = next((i for i in map(index.get, run.group["params"]) if i in found), None)
    if first is not None:
        found[first] = {**found[first], LABEL: part.entry()}
