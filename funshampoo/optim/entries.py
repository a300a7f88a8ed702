"""The entries of a parameter in `optimizer.state`, and what their names mean.

Names with a "/" are the chain's: "block_0_1/graft/onto/second" is a tensor of the chain's state,
and "shared/clock/steps" one that belongs to no parameter and is listed under every one. All other
entries are notes of the optimizer's user, kept, saved and loaded with the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funshampoo.core.checks import hint
from funshampoo.state.parts import PART_KEY, Part

SHARED = "shared/"  # entries of no parameter are listed under every one, so that no tool drops them
LABEL = SHARED + PART_KEY  # of one parameter of a group: which part of the group's state was saved


def is_note(name: Any) -> bool:
    """Whether an entry is a client's note rather than the chain's.

    >>> is_note("rho"), is_note("shared/clock/steps")
    (True, False)
    """
    return not (isinstance(name, str) and "/" in name)


def is_shared(name: str) -> bool:
    """Whether an entry belongs to no parameter and is listed under every one."""
    return name.startswith(SHARED)


def with_shared(own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a parameter together with the shared ones."""
    return {**{SHARED + name: x for name, x in shared.items()}, **own}


def split_shared(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the parameter's own entries, the shared ones under the chain's names for them)."""
    own = {name: x for name, x in entries.items() if not is_shared(name)}
    return own, {n.removeprefix(SHARED): x for n, x in entries.items() if n not in own}


def unlabelled(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries from a `state_dict`, without its label that says which part of a state they are.

    Raises:
        ValueError: they belong to one part of several.
    """
    found = dict(entries)
    label = found.pop(LABEL, None)
    if label is not None and (part := Part.read(label)).size > 1:
        raise ValueError(
            f"these entries are of the part of rank {part.rank} of {part.size}: load the part by "
            "load_state_dict, or unite them all (funshampoo.state.merged)."
        )
    return found


def check_entry(name: str, value: Any, known: Mapping[str, Any] | None) -> None:
    """Check that the value can replace this entry of the chain.

    Args:
        known: the chain's entries; None for a parameter that is in no group.

    Raises:
        KeyError: there is no such entry.
        TypeError: the value is not a tensor.
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
