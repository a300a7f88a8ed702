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

from benchmarks import floor, memory, ranked, roots, steps, whole
from benchmarks.section import Cell, Section, Settings
from benchmarks.table import report, table

HERE = Path(__file__).parent
SECTIONS = {
    "steps": steps.section,
    "whole": whole.section,
    "floor": floor.section,
    "memory": memory.section,
    "ranks": ranked.section,
    "roots": roots.section,
}
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
    results = {"device": device, "sections": earlier(path, quick=options.quick)}

    sections = [SECTIONS[name](settings) for name in options.only or SECTIONS]
    with tqdm(total=sum(len(s.cells) for s in sections), unit="cell", dynamic_ncols=True) as bar:
        for section in sections:
            found = run_section(section, settings, bar)
            results["sections"][section.name] = found
            ordered = {n: results["sections"][n] for n in SECTIONS if n in results["sections"]}
            results["sections"] = ordered
            write(results, path)
            bar.write(f"\n{section.title}\n")
            bar.write("\n".join(table(found["rows"], found["columns"])))
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


def run_section(section: Section, settings: Settings, bar: Any) -> dict[str, Any]:
    """Its rows and all that the table says about them."""
    rows = []
    others = Others()
    for cell in section.cells:
        bar.set_description(f"{section.name}: {cell.label}")
        rows += _rows(cell)
        bar.update()
    versions = [f"torch {torch.__version__}"]
    for package in PEERS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "title": section.title,
        "about": section.about,
        "when": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "where": f"{processor(settings.device)}, {', '.join(versions)}",
        "quick": settings.quick,
        "others": others.cores(),
        "columns": [column._asdict() for column in section.columns],
        "rows": rows,
    }


class Others:
    """How many cores other processes kept busy since this was made: they slow what is timed."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), self._seconds()

    def cores(self) -> float | None:
        """On average. None where the system does not tell."""
        after, elapsed = self._seconds(), time.monotonic() - self.began
        if self.before is None or after is None:
            return None
        return round(max(0.0, after - self.before) / elapsed, 2)

    @staticmethod
    def _seconds() -> float | None:
        """Of all cores, at work for anybody but this process and its children."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
        own = sum(os.times()[:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own


def _rows(cell: Cell) -> list[dict[str, Any]]:
    return [{key: x for key, x in row.items() if x is not None} for row in cell.run()]


def processor(device: torch.device) -> str:
    """What it is called, and how many threads it was given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def write(results: dict[str, Any], path: Path) -> None:
    """JSON, Markdown and, where matplotlib is installed, a picture beside each other."""
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    try:
        plot = importlib.import_module("benchmarks.plot")
    except ImportError:
        return
    plot.draw(results, path.with_suffix(".png"))
