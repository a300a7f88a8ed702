"""Which options decide whether a stage has a field of its state, for errors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OPTIONS = {
    "EveryKState": "every or statistics_every",
    "average": "beta1",
    "eigenvalues": "through",
    "factors": "sides, exponents or vectors",
    "first": "beta1",
    "first_weight": "beta1 or own_steps",
    "held": "by_leaf",
    "kept": "sides, exponents or vectors",
    "largest": "own_steps",
    "second_weight": "own_steps",
    "seen": "dampening, dampen_first_step, first or own_steps",
    "spikes": "spike_factor",
    "streak": "by_leaf",
    "total": "own_steps",
    "value": "basis_tolerance",
    "weight": "beta1 or own_steps",
}


def depends_on(descriptions: Iterable[str]) -> str:
    """A sentence about the options that all of these depend on; "" if one depends on no known one.

    Args:
        descriptions: names of entries, or sentences in which they stand.

    >>> depends_on(["w/scale_by_adam/first"]), depends_on(["w/trace/buffer"])
    (' Whether it has that depends on beta1.', '')
    """
    found = []
    for text in descriptions:
        words = reversed(re.findall(r"\w+", text))
        found.append(next((_OPTIONS[word] for word in words if word in _OPTIONS), ""))
    if not all(found):
        return ""
    options = " and on ".join(dict.fromkeys(found))
    return f" Whether it has that depends on {options}." if found else ""
