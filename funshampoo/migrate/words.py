"""Words of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chosen(argument: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """What the value of an argument is called here.

    Raises:
        ValueError: the table does not have it. Names the argument and what it may be.

    >>> chosen("adjust_lr", "rms_norm", {"rms_norm": "adam"})
    'adam'
    """
    if value not in table:
        words = ", ".join(map(repr, table))
        raise ValueError(f"{argument} is {value!r}; choose one of {words}.")
    return table[value]
