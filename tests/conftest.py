"""For all tests."""

from __future__ import annotations

import pytest

from funshampoo.operators import packed


@pytest.fixture(autouse=True)
def _small_matrices_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packing is asked for: the blocks of tests are small."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
