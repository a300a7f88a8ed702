"""Load a saved state_dict into the runs of all groups, or find out that it does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.optim.group import GroupRun
from funshampoo.optim.ready import Ready
from funshampoo.optim.saved import check_ours, indices_of, loaded_group


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


def loaded(
    runs: Sequence[GroupRun],
    groups: Sequence[dict[str, Any]],
    given: Mapping[str, Any],
    *,
    strict: bool,
    cast: bool,
) -> Loading:
    """The states and groups of a checkpoint that has passed `check_fits`.

    Args:
        runs, groups: of the optimizer.
        given: its state_dict; by number or, as torch.distributed.checkpoint has it, by full name.
        strict, cast: see `funshampoo.state.load_state_dict`.

    Raises:
        ValueError: names missing or unknown, other shapes or dtypes, AdamW's entries.
    """
    by_name = any(isinstance(index, str) for index in given["state"])
    found = Loading([], [], {})
    all_indices = indices_of(given["param_groups"], groups)
    for run, group, saved, indices in zip(runs, groups, given["param_groups"], all_indices):
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
