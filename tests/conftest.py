"""For all tests."""

from __future__ import annotations

import gc
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of ranks go to one worker: each that has one starts processes for them.

    For the rest `--dist loadfile` keeps a file's tests together, so that what it remembers is
    computed once, and `--dist loadgroup` none. Not by the marker `xdist_group`: pytest-xdist 3.8
    writes it to where pytest 9 does not read it, and says nothing.
    """
    if config.getvalue("dist") not in ("loadfile", "loadgroup"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.startswith("tests/distributed/"):
                return "ranks"
            return file if config.getvalue("dist") == "loadfile" else nodeid

    return Scheduling(config, log)
