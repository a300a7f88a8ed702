"""Ranks: what sharing the blocks over processes saves, by benchmarks/ranks.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.section import Cell, Column, Rows, Section, Settings

SCRIPT = Path(__file__).with_name("ranks.py")

ABOUT = """The optimizer's time per step on one rank and on two that share the blocks by
funshampoo.sharded, as benchmarks/ranks.py measures it on the CPU, one thread each: over an interval
of 10 steps with its refresh, block size 256. `python benchmarks/ranks.py --help` says more."""


def section(settings: Settings) -> Section:
    """One cell: the script takes turns by itself. The columns are those that it prints."""
    columns: list[Column] = []

    def run() -> Rows:
        options = ("--rounds", "1", "--models", "transformer") if settings.quick else ()
        printed = subprocess.run(
            [sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False
        )
        headers, rows = parsed(printed.stdout)
        if not rows:
            settings.log(printed.stdout + printed.stderr)
            headers, rows = ["note"], [{"note": "benchmarks/ranks.py did not run here"}]
        columns.extend(Column(header, header) for header in headers)
        return rows

    return Section("ranks", "Ranks", ABOUT, columns, [Cell("1 and 2", run)])


def parsed(printed: str) -> tuple[list[str], Rows]:
    r"""The table that the script prints: headers, and {header: value} for every line below them.

    >>> parsed("model     1 rank   ratio\nmlp   120.0 ms    0.61")
    (['model', '1 rank', 'ratio'], [{'model': 'mlp', '1 rank': '120.0 ms', 'ratio': '0.61'}])
    """
    lines = printed.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("model ")), len(lines))
    headers = [header for line in lines[first : first + 1] for header in re.split(r" {2,}", line)]
    found = [re.findall(r"\S+(?: (?:ms|MiB))?", line) for line in lines[first + 1 :]]
    return headers, [dict(zip(headers, row)) for row in found if len(row) == len(headers)]
