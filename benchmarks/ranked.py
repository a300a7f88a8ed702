"""Ranks: what sharing the blocks over processes saves, by benchmarks/ranks.py."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.section import Cell, Column, Rows, Section, Settings

SCRIPT = Path(__file__).with_name("ranks.py")

ABOUT = """The optimizer's time per step on one rank and on several that share the blocks by
funshampoo.sharded, as benchmarks/ranks.py measures it on the CPU, one thread each: over an interval
of 10 steps with its refresh. Own work is the processor's time outside the collective, of the rank
that has most to do, and its share of one rank's; on fewer cores than ranks it says more than the
time of all, in which ranks wait for a core. `python benchmarks/ranks.py --help` says more."""


def section(settings: Settings) -> Section:
    """A cell for each block size. The columns are those that the script prints."""
    columns = [Column("block size", "block size")]

    def measured(size: int) -> Rows:
        options = ("--rounds", "1", "--models", "transformer") if settings.quick else ()
        ranks = ("2",) if settings.quick else ("2", "4")
        printed = subprocess.run(
            [sys.executable, SCRIPT, "--max-size", str(size), "--ranks", *ranks, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        headers, rows = parsed(printed.stdout)
        if not rows:
            settings.log(printed.stdout + printed.stderr)
            headers, rows = ["note"], [{"note": "benchmarks/ranks.py did not run here"}]
        known = [column.key for column in columns]
        columns.extend(Column(header, header) for header in headers if header not in known)
        return [{"block size": str(size), **row} for row in rows]

    sizes = (256,) if settings.quick else (512, 256)
    cells = [Cell(f"blocks of {size}", partial(measured, size)) for size in sizes]
    return Section("ranks", "Ranks", ABOUT, columns, cells)


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
