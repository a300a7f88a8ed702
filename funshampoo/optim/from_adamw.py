"""Go on from what a torch.optim.AdamW has saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from funshampoo.migrate.seeding import seed_from_adamw
from funshampoo.optim.group import GroupRun
from funshampoo.optim.ready import Ready
from funshampoo.optim.vocabulary import check_rate
from funshampoo.state.checkpoint import check


def seeded(runs: Sequence[GroupRun], saved: Mapping[str, Any]) -> list[Ready]:
    """The states of all groups with AdamW's moments in them.

    Args:
        runs: of the optimizer.
        saved: AdamW's state_dict(), for the same parameters in the same order.

    Raises:
        ValueError: see `funshampoo.state.seed_from_adamw`; or both optimizers were given names,
            and they differ.
    """
    names = [run.names() for run in runs]
    if all(run.group.get("param_names") for run in runs):
        _check_names(saved, [name for group in names for name in group])
    ready = []
    for i, run in enumerate(runs):
        # Two groups may use the same name: only this one's are its own.
        own = [n if i == j else f"group {j}/{n}" for j, g in enumerate(names) for n in g]
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


def _check_names(saved: Mapping[str, Any], ours: Sequence[str]) -> None:
    groups = saved["param_groups"]
    if not all("param_names" in group for group in groups):
        return
    theirs = [name for group in groups for name in group["param_names"]]
    for a, b in zip(theirs, ours):
        if a != b:
            raise ValueError(f"the AdamW has '{a}' where this optimizer has '{b}'.")
