"""What other defaults of `shampoo` would do on both tasks: `python -m benchmarks.defaults`.

Each variant at its own best rate, on all parameters. Writes a line for every run as it goes, so
that an interrupted study goes on, and the table of docs/defaults.md. Half an hour of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import funshampoo as fs
from benchmarks import ensemble
from benchmarks.family import SEEDS, TUNING, everywhere
from benchmarks.page import filled
from benchmarks.step_costs import measure
from benchmarks.study import (
    Entry,
    Result,
    Store,
    standard_error,
    steps_to_goal,
    sweep,
    with_error,
)

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs/defaults.md"

# Spelled out, whatever the defaults become.
BASE: dict[str, Any] = {"exponents": "shampoo", "every": 10, "vectors": "diagonal"}
EXPONENTS: dict[str, Any] = {"1/4": "shampoo", "1/3": 1 / 3, "1/2": "shampoo_squared"}
OPTIONS: dict[str, dict[str, Any]] = {
    "beta3 = beta1²": {"beta3": 0.81},
    "stagger": {"stagger": True},
    'vectors="blocks"': {"vectors": "blocks"},
    "statistics_every=2": {"statistics_every": 2},
    'sides="smaller"': {"sides": "smaller"},
}
FIRST = "1/4, every 10"
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"{name}, every {every}": {"exponents": exponent, "every": every}
        for name, exponent in EXPONENTS.items()
        for every in (10, 3, 1)
    },
    **{f"{FIRST}, {name}": options for name, options in OPTIONS.items()},
    "1/3, every 10, beta3 = beta1²": {"exponents": 1 / 3, "beta3": 0.81},
}


def table(found: Mapping[str, Mapping[str, Result]], store: Store) -> str:
    """A line for each variant; of the loss, also the difference to the first, seed by seed."""
    header, tasks = ["exponent, refreshes"], list(found)
    for task in tasks:
        header += [f"{task}: rate", "steps to goal", "loss", "difference", "ms a step"]
    rows = [header, ["---"] * len(header)]
    for name in found[tasks[0]]:
        row = [name]
        for task in tasks:
            result, first = found[task][name], found[task][FIRST]
            gaps = [x - y for x, y in zip(result.losses, first.losses)]
            row += [
                f"{result.rate:g}" + (" (edge)" if result.at_edge else ""),
                steps_to_goal(result.runs),
                with_error(result.losses, 4),
                "" if name == FIRST else judged(gaps),
                f"{store.costs(task)[name]['ms']:.2f}",
            ]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def entries_of(names: Iterable[str]) -> dict[str, Entry]:
    """Each variant as a method."""
    return {name: Entry(everywhere(fs.shampoo, **(BASE | VARIANTS[name]))) for name in names}


def judged(gaps: Sequence[float]) -> str:
    """In bold where it is more than two standard errors."""
    text = with_error(gaps, 4)
    return f"**{text}**" if abs(mean(gaps)) > 2 * standard_error(gaps) else text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Defaults of shampoo, each at its best rate.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="seconds: two variants, four steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.out / f"defaults{'-quick' if options.quick else ''}.jsonl")
    chosen = list(VARIANTS)[: 2 if options.quick else None]
    entries = entries_of(chosen)
    text = table(study(store, entries, options.quick), store)
    print(text)
    if options.out == RESULTS and not options.quick:
        PAGE.write_text(filled(PAGE.read_text("utf-8"), {"defaults": text}), "utf-8")


def study(store: Store, entries: Mapping[str, Entry], quick: bool) -> dict[str, dict[str, Result]]:
    """{task: {variant: its runs}}; those that the store lacks are made."""
    found: dict[str, dict[str, Result]] = {}
    for name in ensemble.TASKS:
        task = ensemble.TASKS[name](**({"steps": 4} if quick else {}))
        tuning, seeds = (1, 2) if quick else (TUNING[name], SEEDS)
        found[name] = {}
        with tqdm(entries.items(), unit="variant") as progress:
            for variant, entry in progress:
                progress.set_description(f"{name}: {variant}")
                found[name][variant] = sweep(store, task, variant, entry, tuning, seeds, not quick)
        measure(store, task, entries, quick)
    return found


if __name__ == "__main__":
    main()
