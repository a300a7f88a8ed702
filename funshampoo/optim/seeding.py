"""Continue a run of torch.optim.AdamW: take over its moments and rates, for all groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from funshampoo.core.bare import bare_names
from funshampoo.distributed.described import described_value
from funshampoo.migrate.seeding import check_saved, seed_from_adamw
from funshampoo.optim.group import GroupRun
from funshampoo.optim.loading import Checked, Loading
from funshampoo.optim.memory import Memory
from funshampoo.optim.saved import names_of
from funshampoo.optim.values import is_number
from funshampoo.optim.vocabulary import check_rate
from funshampoo.state.checkpoint import check


def checked_seeds(
    memory: Memory, saved: Mapping[str, Any], order: Sequence[str] = (), *, rates: bool = False
) -> Checked:
    """The states of all groups with AdamW's moments in them, once `make` is called.

    Args:
        memory: the optimizer's.
        saved: AdamW's state_dict(), for the same parameters: matched by name if both optimizers
            were given names, else by order.
        order: the parameters' names in the order of the model, which an AdamW without names has;
            groups by role have another.
        rates: whether what is loaded replaces everything, and the groups' rates as well.

    Raises:
        ValueError: see `funshampoo.state.seed_from_adamw`; or the parameters' names differ; a rate
            is out of range.
        TypeError: saved is not a state_dict; a rate is not a single number.
    """
    check_saved(saved)
    runs = memory.runs
    known = [(i, name) for i, run in enumerate(runs) for name in run.names()]
    if names_of([run.group for run in runs]):
        known = _in_their_order(known, saved, order)
    groups = list(map(_rates_of, runs, saved["param_groups"])) if rates else []

    def make() -> Loading:
        if rates:
            memory.forget_all()
        found = Loading([], groups, {})
        states = [run.state() for run in runs]  # all of them, before one does not fit
        for i, (run, state) in enumerate(zip(runs, states)):
            # Two groups may use the same name, so those of the other groups get a prefix.
            own = [name if i == j else f"group {j}/{name}" for j, name in known]
            found.ready.append(run.with_state(seed_from_adamw(state, saved, own)))
            check(found.ready[-1].state)
        return found

    given = [(f"group {i}: {n}", x) for i, own in enumerate(groups) for n, x in own.items()]
    numbers = [line for name, x in given for line in described_value(x, name)]
    return Checked(_steps_of(saved), numbers, make)


def _rates_of(run: GroupRun, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The rates that a scheduler has written to a saved group, for this run's group.

    Raises:
        TypeError, ValueError: a rate is not a single number, or out of range.
    """
    found = {name: copy.deepcopy(saved[name]) for name in ("lr", "initial_lr") if name in saved}
    for rate in found.values():
        check_rate(rate)
    run.check_edit(found)
    return found


def _steps_of(saved: Mapping[str, Any]) -> set[tuple[str, float]]:
    """What AdamW has counted; what is no number is refused when the states are filled."""
    steps = {f"AdamW's {i}": entry.get("step") for i, entry in saved["state"].items()}
    return {(n, float(x)) for n, x in steps.items() if is_number(x) and not getattr(x, "ndim", 0)}


def _in_their_order(
    known: list[tuple[int, str]], saved: Mapping[str, Any], order: Sequence[str]
) -> list[tuple[int, str]]:
    """(group, name) of each parameter, in the AdamW's order."""
    groups = saved["param_groups"]
    theirs = names_of(groups) or list(order)
    if len(theirs) != sum(len(group["params"]) for group in groups):
        return known
    if len(groups) > 1 and not names_of(groups):  # e.g. by decay: shapes don't tell the order
        raise ValueError(
            "the AdamW's groups have no names, so the order of its parameters is unknown. Add them "
            'to what it saved, in its order: saved["param_groups"][i]["param_names"] = [...].'
        )
    theirs, ours = bare_names(theirs), bare_names(name for _, name in known)
    by_name = dict(zip(ours, known))
    if theirs == ours or len(by_name) < len(known):
        return known
    if missing := sorted(by_name.keys() ^ set(theirs)):
        where = "this optimizer" if missing[0] in by_name else "the AdamW"
        raise ValueError(f"'{missing[0]}' is a parameter of {where} alone.")
    return [by_name[name] for name in theirs]
