"""For all tests."""

from __future__ import annotations

import pytest
import torch

from funshampoo.operators import packed


@pytest.fixture(autouse=True)
def _small_matrices_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packing is asked for: the blocks of tests are small."""
    monkeypatch.setattr(packed, "SMALLEST", 1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the marker `gpu` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
