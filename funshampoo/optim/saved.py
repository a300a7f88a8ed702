"""Groups, hyperparameters and parameters in a saved state_dict of the wrapper."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.bare import bare_names
from funshampoo.optim.entries import LABEL, SHARED, is_note, is_shared
from funshampoo.optim.values import copied, is_plain
from funshampoo.state.checkpoint import FORMAT, FORMAT_KEY
from funshampoo.state.naming import named_tensors

Saved = Mapping[Tensor, Mapping[str, Any]]  # {parameter: its entries, including the shared ones}
_OBJECT = "funshampoo: not saved: "  # begins the text that stands for a function or a solver


def saved_group(group: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """The entries of a group, in a form that torch.load(weights_only=True) can read.

    Functions, solvers and the like are replaced by a text, since tools look for every name.
    """
    found = {
        name: copied(value) if is_plain(value) else f"{_OBJECT}{type(value).__qualname__}"
        for name, value in group.items()
    }
    return {**found, "params": list(indices)}


def loaded_group(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The group as it is after loading: an object given at construction stays.

    Names that only the checkpoint has are adopted.
    """
    found = dict(group)
    if "nesterov" in found and "nesterov" not in saved:  # from before it had one
        found["nesterov"] = False
    for name, value in saved.items():
        was_an_object = isinstance(value, str) and value.startswith(_OBJECT)
        replaced = is_plain(group.get(name)) and not was_an_object
        if name == "param_names":
            replaced = bool(value) and not group.get(name)
        if name != "params" and replaced:
            found[name] = _by_number(copy.deepcopy(value), group.get(name))
    return found


def _by_number(value: Any, ours: Any) -> Any:
    """The value, with keys such as "1" turned into ints where ours are ints, as in `exponents`.

    torch.distributed.checkpoint turns keys into strings, and appends what it loads to the entries
    already there under ints: the last one is the checkpoint's.
    """
    if not (isinstance(value, Mapping) and isinstance(ours, Mapping)):
        return value
    if not any(isinstance(key, int) for key in ours):
        return value
    found = {}
    for key, one in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        found[number] = _by_number(one, ours.get(number))
    return found


def check_fits(given: Any, groups: Sequence[Mapping[str, Any]], strict: bool) -> None:
    """Check that the checkpoint has our groups, and no state of anything else.

    Raises:
        ValueError: it does not.
    """
    if not (
        {"state", "param_groups"} <= given.keys()
        and isinstance(given["state"], Mapping)
        and isinstance(given["param_groups"], (list, tuple))
        and all(isinstance(g, Mapping) for g in given["param_groups"])
        and all(isinstance(g.get("params"), (list, tuple)) for g in given["param_groups"])
        and all(isinstance(entries, Mapping) for entries in given["state"].values())
    ):
        raise ValueError("this is no state_dict of an optimizer: see funshampoo.state for one.")
    saved: list[list[Any]] = [group["params"] for group in given["param_groups"]]
    ours = [len(group["params"]) for group in groups]
    theirs = [len(indices) for indices in saved]
    if ours != theirs:
        remedy = "build it with the same groups."
        if any(map(is_adamws, given["state"].values())):  # `for_model` has groups by role
            remedy = (
                "it is of an AdamW of torch.optim, and seed_from_adamw(state_dict) takes its "
                "moments over; rates are then those that you give."
            )
        raise ValueError(
            f"the checkpoint has groups of {theirs} parameters, this optimizer of {ours}: {remedy}"
        )
    foreign = given["state"].keys() - {index for indices in saved for index in indices}
    if strict and foreign:
        raise ValueError(
            f"the checkpoint has a state for {min(map(str, foreign))}, which is in none of its "
            "groups."
        )


def indices_of(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[list[Any]]:
    """The checkpoint's key for every parameter of every group: by name if both have names.

    Names from a wrapped module are reduced to the module's own; see `bare_names`.

    Raises:
        ValueError: the names differ, and one of them denotes another parameter there.
    """
    theirs, ours = names_of(saved), names_of(groups)
    by_order = [list(group["params"]) for group in saved]
    if not theirs or not ours or theirs == ours:
        return by_order
    there, own = bare_names(theirs), bare_names(ours)
    place = dict(zip(there, itertools.chain(*by_order)))
    if len(place) == len(own) and place.keys() == set(own):
        found = map(place.__getitem__, own)
        return [list(itertools.islice(found, len(group["params"]))) for group in groups]
    for i, (name, here) in enumerate(zip(there, own)):
        if name in own and here != name:
            raise ValueError(
                f"the checkpoint's parameter {i} is '{name}', the optimizer's is '{here}', and "
                f"'{name}' is another one here: give both the same parameters, or leave out the "
                "names to go by order."
            )
    if not place.keys() & set(own):
        warnings.warn(
            f"the checkpoint's parameters have other names ('{there[0]}', ...) than this "
            f"optimizer's ('{own[0]}', ...): they are loaded by order.",
            stacklevel=4,
        )
    return by_order


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the parameters of all groups; [] if a group has no names."""
    names: list[Any] = [group.get("param_names") for group in groups]
    return [name for own in names for name in own] if all(names) else []


def flattened(
    saved: Saved, named: Sequence[tuple[str, Tensor]], known: Set[str], state: Any
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """({full name: value}, {parameter: notes of clients}) from what was saved of one group.

    Args:
        saved: {parameter: its entries, including the shared ones}; a parameter that is missing
            keeps what it has in `state`.
        named: (name, parameter) of all parameters in the group.
        known: the names of those that have a state.
        state: the state that is to be filled.

    Raises:
        ValueError: a value that should be a tensor is not.
    """
    flat: dict[str, Any] = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu")}
    notes: dict[Tensor, dict[str, Any]] = {}
    places: dict[str, Tensor] = {}
    missing = {name for name, p in named if name in known and p not in saved}
    for owner, rest, x in named_tensors(state):
        places[f"{owner}/{rest}"] = x
        if owner in missing:
            flat[f"{owner}/{rest}"] = x
    for name, p in named:
        for entry, x in saved.get(p, {}).items():
            full = f"{name}/{entry}"
            if full not in places and is_note(entry):
                notes.setdefault(p, {})[entry] = x
                continue
            if is_shared(entry) and full not in places:  # a stage may also be called "shared"
                full = entry.removeprefix(SHARED)
            if isinstance(x, Tensor):
                flat[full] = x
            elif x != {}:  # torch's helpers put {} where the checkpoint has nothing
                raise ValueError(f"'{full}' is no tensor: the checkpoint is damaged.")
    return flat, notes


def with_state(saved: Saved) -> set[Tensor]:
    """The parameters that had a state when this was saved; some may be frozen by now.

    Shared entries count: a rank that owns none of a parameter's blocks has saved no others. The
    label does not: beside a client's notes it may be all.
    """
    return {p for p, e in saved.items() if any(n != LABEL and not is_note(n) for n in e)}


def is_adamws(entries: Mapping[str, Any]) -> bool:
    """Whether these are the entries that torch's AdamW and Adam have for a parameter."""
    return entries.keys() >= {"exp_avg", "exp_avg_sq"}


def check_ours(entries: Mapping[str, Any]) -> None:
    """Check that these entries of a parameter are not those of torch's AdamW.

    Raises:
        ValueError: they are.
    """
    if is_adamws(entries):
        raise ValueError(
            "this is the state of an AdamW of torch.optim: seed_from_adamw(state_dict) takes its "
            "moments over, and load_state_dict does with accept_adamw=True at construction."
        )
