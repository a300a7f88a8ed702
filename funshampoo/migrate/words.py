"""Words of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funshampoo.core.checks import check_choice


def chosen(argument: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """What the value of an argument is called here.

    Raises:
        ValueError: the table does not have it. Names the argument and what it may be.

    >>> chosen("adjust_lr", "rms_norm", {"rms_norm": "adam"})
    'adam'
    """
    check_choice(argument, value, tuple(table))
    return table[value]
