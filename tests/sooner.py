"""Parameters of which `make test` takes some."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def these(values: Iterable[Any], sooner: Collection[Any]) -> list[Any]:
    """Parameters, of which those not in `sooner` are slow; a mapping goes by its names."""
    named = list(values.items() if isinstance(values, Mapping) else [(x, x) for x in values])
    assert all([name in [known for known, _ in named] for name in sooner]), sooner
    return [
        pytest.param(
            value,
            id=name if isinstance(values, Mapping) else None,
            marks=[] if name in sooner else [pytest.mark.slow],
        )
        for name, value in named
    ]
