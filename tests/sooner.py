"""Parameters of which `make test` takes some."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import pytest


def these(values: Iterable[Any], sooner: Container[Any]) -> list[Any]:
    """Parameters, of which those not in `sooner` are slow; a mapping goes by its names."""
    named = values.items() if isinstance(values, Mapping) else [(x, x) for x in values]
    return [
        pytest.param(
            value,
            id=name if isinstance(values, Mapping) else None,
            marks=[] if name in sooner else [pytest.mark.slow],
        )
        for name, value in named
    ]
