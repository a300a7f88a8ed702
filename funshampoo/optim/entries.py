"""The entries that `optimizer.state` has for a parameter, by their names.

Those with a "/" in them are the chain's: "block_0_1/graft/onto/second" is a tensor of the chain's
state, and "shared/clock/steps" one that belongs to nobody and stands with every parameter. All
others are notes of whoever uses the optimizer, kept, saved and loaded with the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funshampoo.core.checks import hint
from funshampoo.state.parts import PART_KEY, Part

SHARED = "shared/"  # what is nobody's stands with every parameter, so that no tool drops it


def is_note(name: Any) -> bool:
    """Whether an entry is a client's, and none of the chain's.

    >>> is_note("rho"), is_note("shared/clock/steps")
    (True, False)
    """
    return not (isinstance(name, str) and "/" in name)


def is_shared(name: str) -> bool:
    """Whether an entry is nobody's, and stands with every parameter."""
    return name.startswith(SHARED)


def together(own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a parameter with those that stand with every one."""
    return {**{SHARED + name: x for name, x in shared.items()}, **own}


def parted(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(its own, those that are shared, by the names that the chain has for them)."""
    own = {name: x for name, x in entries.items() if not is_shared(name)}
    return own, {n.removeprefix(SHARED): x for n, x in entries.items() if n not in own}


def unlabelled(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries as `state_dict` has them, without what it says of parts of a state.

    Raises:
        ValueError: they are of a part.
    """
    found = dict(entries)
    label = found.pop(SHARED + PART_KEY, None)
    if label is not None and (part := Part.read(label)).size > 1:
        raise ValueError(
            f"these entries are of the part of rank {part.rank} of {part.size}: load the part by "
            "load_state_dict, or unite them all (funshampoo.state.merged)."
        )
    return found


def check_entry(name: str, value: Any, known: Mapping[str, Any] | None) -> None:
    """The value can stand in the place of this entry of the chain's.

    Args:
        known: the chain's entries; None of a parameter that is in no group.

    Raises:
        KeyError: there is no such place.
        TypeError: it is no tensor.
        ValueError: it has another shape or dtype.
    """
    if known is not None and name not in known:
        raise KeyError(
            f"the optimizer has no entry '{name}' for this parameter{hint(name, known)} Names of "
            "your own have no '/' in them."
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"'{name}' is a tensor of the optimizer's state, not {value!r}.")
    place = value if known is None else known[name]
    if value.shape != place.shape or value.dtype != place.dtype:
        raise ValueError(
            f"'{name}' is {place.dtype} of shape {tuple(place.shape)}; the value is "
            f"{value.dtype} of shape {tuple(value.shape)}."
        )
