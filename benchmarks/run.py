"""Run the benchmarks and write what they found: a table, the numbers, and a picture."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import curves, floor, memory, ranked, roots, steps, whole
from benchmarks.section import Cell, Column, Section, Settings
from benchmarks.table import report, section_table

HERE = Path(__file__).parent
SECTIONS = {
    "steps": steps.section,
    "family": steps.family,
    "whole": whole.section,
    "floor": floor.section,
    "memory": memory.section,
    "ranks": ranked.section,
    "roots": roots.section,
    "curves": curves.section,
}
DISTURBED = 0.1  # cores kept busy by others, from which on a cell should be measured again
PEERS = ("distributed_shampoo", "pytorch_optimizer", "heavyball")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, write."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(torch.device(options.device), options.quick, tqdm.write)
    folder = options.output or (
        HERE.parent / "results" / "benchmarks" if options.quick else HERE / "results"
    )
    folder.mkdir(parents=True, exist_ok=True)
    device = device_name(settings.device, options.threads)
    path = folder / f"{device}.json"
    found = earlier(path, quick=options.quick)

    sections = [SECTIONS[name](settings) for name in options.only or SECTIONS]
    with tqdm(total=sum(len(s.cells) for s in sections), unit="cell", dynamic_ncols=True) as bar:
        for section in sections:
            before = found.get(section.name, {}).get("cells", {}) if options.resume else {}
            cells = kept(before, section)
            for cell in section.cells:
                bar.set_description(f"{section.name}: {cell.label}")
                if cell.label not in cells:
                    cells[cell.label] = measured(cell)
                    found[section.name] = described(section, cells, settings)
                    ordered = {name: found[name] for name in SECTIONS if name in found}
                    write({"device": device, "sections": ordered}, path)
                bar.update()
            bar.write(f"\n{section.title}\n")
            bar.write("\n".join(section_table(found[section.name])))
    draw(path)
    print(f"\nwritten: {path.with_suffix('.md')}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, below 2 minutes")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(SECTIONS),
        help="a section to run, more by repeating it; the results keep what they have of others",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave what an interrupted run has measured, where nobody else kept the cores busy",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--output",
        type=Path,
        help="a folder; default: benchmarks/results, of a quick run results/benchmarks",
    )
    return parser.parse_args(arguments)


def device_name(device: torch.device, threads: int) -> str:
    """Of the files: "cpu-2-threads", or what the GPU is called."""
    if device.type == "cpu":
        return f"cpu-{threads}-thread{'s' * (threads > 1)}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def earlier(path: Path, *, quick: bool) -> dict[str, Any]:
    """Sections of a run before, unless it was quick and this one is not."""
    if not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text())["sections"]
    return {name: s for name, s in sections.items() if s["quick"] == quick}


def kept(before: dict[str, Any], section: Section) -> dict[str, Any]:
    """Of an interrupted run, the cells that nobody disturbed."""
    done = {c.label: before[c.label] for c in section.cells if c.label in before}
    if section.together and len(done) < len(section.cells):
        return {}
    return {label: cell for label, cell in done.items() if cell["others"] <= DISTURBED}


def measured(cell: Cell) -> dict[str, Any]:
    """Its rows, and who else was at work."""
    others = Others()
    rows = [{key: x for key, x in row.items() if x is not None} for row in cell.run()]
    cores = others.cores()
    if cores > DISTURBED:
        rows = [{**row, "others": cores} for row in rows]
    return {"when": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"} | {
        "others": cores,
        "rows": rows,
    }


def described(section: Section, cells: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """All that the table says about a section."""
    versions = [f"torch {torch.__version__}"]
    for package in PEERS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    columns = [*section.columns, Column("others", "cores kept busy by others", "number")]
    return {
        "title": section.title,
        "about": section.about,
        "where": f"{processor(settings.device)}, {', '.join(versions)}",
        "quick": settings.quick,
        "columns": [column._asdict() for column in columns],
        "cells": {c.label: cells[c.label] for c in section.cells if c.label in cells},
    }


class Others:
    """How many cores other processes kept busy since this was made: they slow what is timed."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), self._seconds()

    def cores(self) -> float:
        """On average; 0 where the system does not tell."""
        spent = self._seconds() - self.before
        return round(max(0.0, spent) / (time.monotonic() - self.began), 2)

    @staticmethod
    def _seconds() -> float:
        """Of all cores, at work for anybody but this process and its children."""
        path = Path("/proc/stat")
        if not path.exists():
            return 0.0
        user, nice, system, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
        own = sum(os.times()[:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own


def processor(device: torch.device) -> str:
    """What it is called, and how many threads it was given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def write(results: dict[str, Any], path: Path) -> None:
    """JSON and Markdown beside each other, after every cell: an interrupted run leaves them."""
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


def draw(path: Path) -> None:
    """The picture of what was written, where matplotlib is installed."""
    try:
        plot = importlib.import_module("benchmarks.plot")
    except ImportError:
        return
    plot.draw(json.loads(path.read_text()), path.with_suffix(".png"))
