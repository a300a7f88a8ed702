"""The tests that need a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.device.group import Cell, Row, Setting, emit

TESTS = Path(__file__).parents[2] / "tests"
MARK = "mark.gpu"
FIRST = ("test_cuda_graphs.py", "test_device.py")
WORKERS = 12  # processes, where pytest-xdist is installed
TOLD = re.compile(r">|E |\S+\.py:\d+")  # of a traceback: lines that were run, messages, places
REPORTS = 20.0  # seconds between two lines that say how far it has come


def cells(setting: Setting) -> Iterator[Cell]:
    """One: all of them, in this process."""
    yield Cell("pytest", partial(_cell, setting))


def _cell(setting: Setting) -> Iterator[Row]:
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a machine may have a dozen
    try:
        pytest = importlib.import_module("pytest")
    except ImportError:
        yield {"error": "pytest is not installed"}
        return
    marked = [path for path in sorted(TESTS.rglob("test_*.py")) if MARK in path.read_text()]
    marked.sort(key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))
    recorder = Recorder(setting)
    options = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider"]
    options += ["-m", "gpu", "-W", "default", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and not setting.rehearse:
        options += ["-p", "xdist", "-n", str(WORKERS), "--dist", "loadgroup"]
    status = pytest.main([*options, *map(str, marked)], plugins=[recorder])
    yield {"files": [path.name for path in marked], "exit": int(status)} | recorder.counts
    yield {"slowest_s": [f"{name} {x:.2f}" for x, name in sorted(recorder.spent)[:-6:-1]]}


class Recorder:
    """A plugin of pytest: counts, prints a failure as it happens, and stops at the deadline."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, errors=0)
        self.spent: list[tuple[float, str]] = []
        self.reported = time.monotonic()
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        """To be told when to stop."""
        self.session = session

    def pytest_collectreport(self, report: Any) -> None:
        """A file that can't be read."""
        if report.failed:
            self.counts["errors"] += 1
            self._print(report, "collecting")

    def pytest_collection_finish(self, session: Any) -> None:
        """How many there will be."""
        self.counts["collected"] = len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, test and teardown of one."""
        if report.failed:
            self.counts["failed" if report.when == "call" else "errors"] += 1
            self._print(report, report.when)
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "teardown" and time.monotonic() - self.reported > REPORTS:
            self.reported = time.monotonic()
            emit({"group": "tests", "cell": "so far"} | self.counts)
        if self.setting.left() < 5:  # workers have no such plugin: who gives them work has to stop
            others = self.session.config.pluginmanager.getplugin("dsession")
            for who in [self.session, *([others] if others else [])]:
                who.shouldstop = "no time is left"
            self.counts["stopped_for_time"] = 1
        if report.when == "call":
            self.spent.append((report.duration, report.nodeid.rpartition("/")[2]))

    def _print(self, report: Any, when: str) -> None:
        told = [line[:200] for line in str(report.longrepr).splitlines() if TOLD.match(line)]
        row = {"group": "tests", "cell": "pytest", "failed": report.nodeid, "when": when}
        emit(row | {"says": told[-16:]})
