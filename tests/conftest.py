"""For all tests."""

from __future__ import annotations

import gc

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


def pytest_collection_finish() -> None:
    """What is there by now stays, all of torch: to look it over again takes a fifth of the time."""
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where pytest-xdist has several workers, a file's tests stay together, and all of ranks.

    Each worker that has a test of ranks starts processes for them. And what a file remembers is
    computed once, while workers that ask for one test at a time spend a tenth of theirs on asking.
    """
    if item.path.parent.name == "distributed":
        item.add_marker(pytest.mark.xdist_group("ranks"))
    elif not item.get_closest_marker("gpu"):  # of those `make device` has most in one file
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
