"""The learning rate of the constructor, by which some published methods divide later ones."""

from __future__ import annotations

import inspect
from typing import Any

from funshampoo.migrate.published import METHODS, from_published
from funshampoo.migrate.reference import from_reference


def first_rate_of(method: Any) -> str | None:
    """The argument that is lr as the constructor got it; None where there is none left to give.

    Args:
        method: `from_reference`, or a partial of it or of `from_published`; others have none.

    >>> import functools
    >>> first_rate_of(functools.partial(from_published, "SOAP-Muon"))
    'initial_lr'
    """
    function, given = getattr(method, "func", method), getattr(method, "keywords", {})
    if function is from_published:
        name = given.get("method", *getattr(method, "args", ())[:1])
        function = METHODS.get(str(name))
    elif function is not from_reference:
        return None
    known = inspect.signature(function).parameters if function else {}
    return next((n for n in ("peak_lr", "initial_lr") if n in known and n not in given), None)
