"""{pattern: role or settings}: what a user knows better."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from funshampoo.blocks.stacked import Stacked
from funshampoo.core.bare import bare_names
from funshampoo.core.checks import check_choice
from funshampoo.models.kinds import ROLES, Kind, kind_of_shape

Overrides: TypeAlias = Mapping[str, str | Mapping[str, Any]]

_OF_KIND = ("role", "axis", "parts")


def settings_of(names: Iterable[str], overrides: Overrides | None) -> dict[str, dict[str, Any]]:
    """{parameter: what the patterns that fit it say}; a later pattern overrules an earlier one.

    Raises:
        TypeError: overrides, or a value, is of another type.
        ValueError: a pattern fits no name; says the nearest one.
    """
    known = list(names)
    bare = bare_names(known)  # a pattern for the module fits one that is compiled, too
    found: dict[str, dict[str, Any]] = {name: {} for name in known}
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides is {overrides!r}; give {{pattern: role or settings}}.")
    for pattern, value in (overrides or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides has the pattern {pattern!r}; give a name, or part of one.")
        if not isinstance(value, str | Mapping):
            raise TypeError(
                f"overrides['{pattern}'] is {value!r}; give a role, or a dict of settings."
            )
        fitting = [
            name
            for name, own in zip(known, bare)
            if fnmatchcase(name, pattern) or fnmatchcase(own, pattern)
        ]
        if not fitting:
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise ValueError(
                f"overrides has the pattern '{pattern}', which fits no parameter"
                + (f"; the nearest name is '{nearest[0]}'." if nearest else ": there are none.")
            )
        for name in fitting:
            own = {"role": value} if isinstance(value, str) else dict(value)
            if "role" in own:  # what was said of another role is of no use to it
                found[name] = extra_settings(found[name])
            found[name] |= own
    return found


def overridden(name: str, kind: Kind, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Kind:
    """What the parameter is by these settings.

    Raises:
        ValueError: a role that there is not, or that does not go with the shape; names both.
    """
    if not any(key in settings for key in _OF_KIND):
        return kind
    role = settings.get("role", kind.role)
    check_choice(f"the role of '{name}'", role, ROLES)
    if role in ("experts", "heads"):
        kind = kind._replace(role=role, stacked=_stack(name, kind, shape, settings, role))
    elif "axis" in settings or "parts" in settings:
        raise ValueError(f"'{name}' is to be taken apart: give it the role 'heads' or 'experts'.")
    else:
        kind = kind._replace(role=role, stacked=None)
    if role not in ("vector", "embedding") and kind_of_shape(shape).role == "vector":
        raise ValueError(f"'{name}' of shape {shape} is no matrix: its role can't be '{role}'.")
    return kind


def extra_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings is for the method."""
    return {key: value for key, value in settings.items() if key not in _OF_KIND}


def _stack(
    name: str, kind: Kind, shape: tuple[int, ...], settings: Mapping[str, Any], role: str
) -> Stacked:
    known = kind.stacked or Stacked()
    if role == "heads" and kind.role != "heads" and "parts" not in settings:
        raise ValueError(
            f"'{name}' is to be taken apart by heads: say how many matrices it is, by "
            "{'role': 'heads', 'parts': ..., 'axis': ...}."
        )
    parts = settings.get("parts", known.parts if role == kind.role else None)
    stack = Stacked(settings.get("axis", known.axis), parts)
    try:
        stack(shape)
    except ValueError as error:
        raise ValueError(f"'{name}' can't have the role '{role}': {error}") from None
    return stack
