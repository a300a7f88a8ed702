"""A change of several things that is made as a whole, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any


@contextlib.contextmanager
def all_or_nothing(parts: Sequence[MutableMapping[str, Any]]) -> Iterator[None]:
    """Put back what these hold if an exception, Ctrl-C too, ends the block.

    Args:
        parts: dicts whose entries are replaced in the block; nothing is written to the values.

    >>> part = {"lr": 1}
    >>> try:
    ...     with all_or_nothing([part]):
    ...         part["lr"] = 2
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     part
    {'lr': 1}
    """
    before = [dict(part) for part in parts]
    try:
        yield
    except BaseException:
        for part, entries in zip(parts, before):
            part.clear()
            part.update(entries)
        raise
