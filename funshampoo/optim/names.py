"""The names of a group's parameters: a tensor keeps its name wherever it moves in the list."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from funshampoo.core.text import plural


class Names:
    """The names under which a group's chain knows its parameters.

    They are those given in "param_names", else param_0, param_1, ... counted over all groups. When
    the list "params" is edited, tensors that were there before keep their names, and "param_names"
    is updated; when "param_names" is edited, it takes precedence.

    Args:
        first: the number of parameters in the groups before this one.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._known: dict[Tensor, str] = {}
        self._given: list[str] | None = None

    def of(self, group: dict[str, Any]) -> list[str]:
        """One name per parameter; a parameter listed twice has its first name.

        Raises:
            ValueError: an edited "param_names" has the wrong length, or two parameters share one.
        """
        parameters: list[Tensor] = group["params"]
        given: list[str] | None = group.get("param_names") or None
        if given is not None and given != self._given:
            names = _as_given(parameters, given)
        else:
            names = self._followed(parameters, given)
            if given is not None and list(given) != names:
                group["param_names"] = names
        self._known = dict(zip(parameters, names))
        self._given = None if given is None else list(group["param_names"])
        return names

    def _followed(self, parameters: Sequence[Tensor], given: list[str] | None) -> list[str]:
        """Known tensors keep their names; others are named by position."""
        found = {p: self._known[p] for p in parameters if p in self._known}
        taken = set(found.values())
        for i, p in enumerate(parameters):
            if p in found:
                continue
            own = given[i] if given is not None and len(given) == len(parameters) else None
            numbers = itertools.chain([self._first + i], itertools.count())
            free = (n for n in map("param_{}".format, numbers) if n not in taken)
            found[p] = own if own is not None and own not in taken else next(free)
            taken.add(found[p])
        return [found[p] for p in parameters]


def _as_given(parameters: Sequence[Tensor], given: Sequence[str]) -> list[str]:
    if len(given) != len(parameters):
        raise ValueError(
            f"the group has {plural(len(parameters), 'parameter')} and {len(given)} param_names: "
            "give one name a parameter."
        )
    names: dict[Tensor, str] = {}
    owners: dict[str, Tensor] = {}
    for p, name in zip(parameters, given):
        own = names.setdefault(p, name)
        if owners.setdefault(own, p) is not p:
            raise ValueError(f"two parameters of the group are named '{own}'.")
    return [names[p] for p in parameters]
