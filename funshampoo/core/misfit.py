"""How a state differs from the one that `init` makes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.clock import CLOCK
from funshampoo.core.text import plural
from funshampoo.state.stages import BlockedState, HyperparamsState, ShardedState, WrappedState

# Not compared: descriptions in keys only, which do not distinguish states; and entries that may be
# edited between steps, whose errors `inject_hyperparams` reports itself.
_LEFT_OUT: dict[type, tuple[str, ...]] = {
    HyperparamsState: ("ranges", "hyperparams"),
    WrappedState: ("pace",),
    BlockedState: ("layout",),
}


def misfit(wanted: Any, found: Any, devices: Collection[torch.device], given: str) -> str:
    """The first difference, and the remedy, as a sentence; "" if there is none.

    Args:
        wanted: the state from `init`, for parameters on the meta device.
        found: the state.
        devices: of the parameters; a tensor of `found` may be there if `wanted` has it on meta.
        given: what `init` was called with, "parameters" or "gradients".
    """
    if isinstance(wanted, dict) and isinstance(found, dict) and CLOCK not in wanted:
        found = {name: own for name, own in found.items() if name != CLOCK}  # unused
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() != found.keys():
        return other_stages(set(wanted), set(found))
    problem = _difference(wanted, found, "", devices)
    if not problem:
        return ""
    if given == "gradients":
        return (
            f"these gradients do not fit the state: {problem}. Build the transformation that made "
            "it; give gradients of the parameters that it was made for, and params too where those "
            "have other dtypes; or call init."
        )
    return (
        f"the state is not one of this transformation for these parameters: {problem}. Build the "
        "transformation that made it and give the parameters that it was made for, or call init. A "
        "stage of your own has to keep what it makes in init in its shapes."
    )


def other_stages(stages: set[str], found: set[Any]) -> str:
    """The message for a chain of these stages and a state that has others."""
    missing, unknown = sorted(stages - found), sorted(map(str, found - stages))
    return (
        f"the state is not this chain's: it lacks {missing or 'nothing'} and has "
        f"{unknown or 'nothing'} besides. Build the chain that made it, or call init; where stages "
        "were inserted, pass tx.init(params) | state."
    )


def _difference(wanted: Any, found: Any, path: str, devices: Collection[torch.device]) -> str:
    at = f"at '{path}' it" if path else "it"
    if isinstance(wanted, Tensor):
        return _of_tensors(wanted, found, at, devices)
    if isinstance(wanted, dict) and isinstance(found, dict):
        if wanted.keys() != found.keys():
            return f"{at} {_of_keys(wanted, found)}"
        pairs = [(str(key), child, found[key]) for key, child in wanted.items()]
    elif wanted == () and found == ():  # empty, under any name
        return ""
    elif type(wanted) is type(found) and isinstance(wanted, (tuple, list)):
        if isinstance(wanted, ShardedState) and _of_others(wanted, found):
            return ""  # `sharded` has its own message
        if isinstance(wanted, BlockedState) and wanted.layout != found.layout:
            return f"{at} {_of_layouts(wanted.layout, found.layout)}"
        if len(wanted) != len(found):
            return f"{at} has {plural(len(found), 'entry', 'entries')} and not {len(wanted)}"
        names = getattr(wanted, "_fields", range(len(wanted)))
        triples = zip(map(str, names), wanted, found)
        left_out = _LEFT_OUT.get(type(wanted), ())
        pairs = [triple for triple in triples if triple[0] not in left_out]
    elif type(wanted) is type(found):  # of a type that only its authors know
        return ""
    else:
        return f"{at} is {_kind(found)} and not {_kind(wanted)}"
    for name, child, own in pairs:
        if problem := _difference(child, own, f"{path}/{name}" if path else name, devices):
            return problem
    return ""


def _of_others(wanted: ShardedState, found: ShardedState) -> bool:
    """Whether it is another rank's state; by leaf, if every rank has all the names."""
    by_leaf = any([own.keys() <= {"owned", "elsewhere"} for own in wanted.owned.values()])
    if by_leaf and wanted.owned.keys() != found.owned.keys():
        return False
    return wanted.owned != found.owned or wanted.ranks != found.ranks


def _of_tensors(wanted: Tensor, found: Any, at: str, devices: Collection[torch.device]) -> str:
    if not isinstance(found, Tensor):
        return f"{at} is {_kind(found)} and not a tensor"
    if wanted.shape != found.shape:
        return f"{at} has shape {tuple(found.shape)} and not {tuple(wanted.shape)}"
    if wanted.dtype != found.dtype:
        return f"{at} is of {found.dtype} and not of {wanted.dtype}"
    if found.device not in (devices if wanted.is_meta else (wanted.device, *devices)):
        return f"{at} is on {found.device}, where no parameter is"
    return ""


def _of_keys(wanted: dict[Any, Any], found: dict[Any, Any]) -> str:
    missing = [str(key) for key in wanted if key not in found]
    unknown = [str(key) for key in found if key not in wanted]
    lacks = f"lacks {missing}" if missing else ""
    return " and ".join(filter(None, [lacks, f"has {unknown} besides" if unknown else ""]))


def _of_layouts(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    if wanted.keys() != found.keys():
        return _of_keys(wanted, found)
    name = next((name for name in wanted if wanted[name] != found[name]), "")
    return f"has other blocks for '{name}', of another shape, dtype or size of blocks"


def _kind(x: Any) -> str:
    return "None" if x is None else "()" if x == () else f"of type {type(x).__name__}"
