"""All recipes on both tasks, each at its best rate of one grid: `python -m benchmarks.family`.

Writes a line for every run as it goes, so that an interrupted study goes on; then the tables and
the picture of docs/family.md. About half an hour of one core, seconds where no run is missing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import funshampoo as fs
from benchmarks import ensemble
from benchmarks.ensemble import Method, Task
from benchmarks.page import filled
from benchmarks.step_costs import measure
from benchmarks.study import (
    Entry,
    Result,
    Store,
    fewest_steps,
    standard_error,
    steps_to_goal,
    sweep,
    with_error,
)
from examples.record import record
from funshampoo.core.contract import GradientTransformation

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "family.md"
SEEDS, TUNING = 5, {"digits": 5, "text": 2}
REST = 0.01  # of what is not hidden: AdamW's best rate on both tasks

Recipe = Callable[..., GradientTransformation]


def everywhere(recipe: Recipe, **options: Any) -> Method:
    """The recipe on all parameters, without weight decay."""

    def method(rate: Any, task: Task) -> GradientTransformation:
        return recipe(task.schedule(rate), **_common(recipe), **options)

    return method


def on_hidden(recipe: Recipe, **options: Any) -> Method:
    """The recipe on hidden matrices and kernels, and AdamW at the rate REST on all others."""

    def method(rate: Any, task: Task) -> GradientTransformation:
        inner = recipe(task.schedule(rate), **_common(recipe), **options)
        return fs.partition({"hidden": inner, "rest": rest(task)}, labels_of(task))

    return method


def rest(task: Task) -> GradientTransformation:
    return fs.adamw(task.schedule(REST), weight_decay=0.0)


def labels_of(task: Task) -> Callable[[Any], Any]:
    return lambda params: {n: "hidden" if n in task.hidden else "rest" for n in params}


def _common(recipe: Recipe) -> dict[str, Any]:
    """No decay, and a run that diverges does so to its end: the others go on."""
    wanted = {"weight_decay": 0.0, "max_failures": None}
    return {k: v for k, v in wanted.items() if k in inspect.signature(recipe).parameters}


def schedule_free(rate: Any, task: Task) -> GradientTransformation:
    """It needs no way down, so it gets none."""
    return fs.chain(fs.scale_by_adam(0.0), fs.schedule_free(task.constant(rate)))


def the_record(rate: Any, task: Task) -> GradientTransformation:
    return record(task.schedule(rate), rest(task), labels_of(task))


# A kernel is a matrix to those that were written for matrices. Exponents are spelled out, whatever
# the default becomes.
METHODS: dict[str, Entry] = {
    "SGD, Nesterov": Entry(everywhere(fs.sgd, momentum=0.9, nesterov=True)),
    "AdamW": Entry(everywhere(fs.adamw)),
    "NAdamW": Entry(everywhere(fs.adamw, nesterov=True)),
    "Schedule-Free AdamW": Entry(schedule_free, averages=True),
    "Lion": Entry(everywhere(fs.lion)),
    "sign descent": Entry(everywhere(fs.sign_descent)),
    "Shampoo, 1/4": Entry(everywhere(fs.shampoo, exponents="shampoo")),
    "Shampoo, 1/3": Entry(everywhere(fs.shampoo, exponents=1 / 3)),
    "SOAP": Entry(everywhere(fs.soap)),
    "SOAP, nesterov": Entry(everywhere(fs.soap, nesterov=True)),
    "AdamW, hidden": Entry(on_hidden(fs.adamw)),
    "Shampoo, 1/4, hidden": Entry(on_hidden(fs.shampoo, exponents="shampoo")),
    "Shampoo, 1/3, hidden": Entry(on_hidden(fs.shampoo, exponents=1 / 3)),
    "eigenvalue-corrected, hidden": Entry(on_hidden(fs.eigenvalue_shampoo)),
    "eigenvalue-corrected, nesterov, hidden": Entry(
        on_hidden(fs.eigenvalue_shampoo, nesterov=True)
    ),
    "KL-Shampoo, hidden": Entry(on_hidden(fs.kl_shampoo)),
    "KL-Shampoo from 0.001, hidden": Entry(on_hidden(fs.kl_shampoo, initial_eigenvalue=0.001)),
    "KL-Shampoo from 0.001, nesterov, hidden": Entry(
        on_hidden(fs.kl_shampoo, initial_eigenvalue=0.001, nesterov=True)
    ),
    "SOAP, hidden": Entry(on_hidden(fs.soap)),
    "SOAP, nesterov, hidden": Entry(on_hidden(fs.soap, nesterov=True)),
    "KL-SOAP, hidden": Entry(on_hidden(fs.kl_soap)),
    "KL-SOAP, nesterov, hidden": Entry(on_hidden(fs.kl_soap, nesterov=True)),
    "SPlus, hidden": Entry(on_hidden(fs.splus, average=0.9, merge="matrix"), averages=True),
    "spectral descent, hidden": Entry(on_hidden(fs.spectral_descent)),
    "Muon, hidden": Entry(on_hidden(fs.muon)),
    "NorMuon, hidden": Entry(on_hidden(fs.normuon)),
    "NorMuon, nesterov, hidden": Entry(on_hidden(fs.normuon, nesterov=True)),
    "SOAP-Muon, hidden": Entry(on_hidden(fs.soap_muon, merge="matrix")),
    "the record's stack, hidden": Entry(the_record, averages=True),
}
QUICK = ("AdamW", "Shampoo, 1/4, hidden", "the record's stack, hidden")


def table(task: Task, results: Mapping[str, Result], spent: Mapping[str, Any]) -> str:
    """A line for each method, the least loss first."""
    goal = f"{100 * task.goal:g} %" if task.measure == "accuracy" else f"{task.goal:g}"
    header = [
        "method",
        "best rate",
        f"steps to {goal}",
        "final loss",
        "final accuracy",
        "fewest steps",
    ]
    rows = [[*header, "ms a step", "state, KiB"], ["---"] * 8]
    for name, result in sorted(results.items(), key=lambda item: mean(item[1].losses)):
        accuracies = [100 * run.accuracy for run in result.runs]
        cells = [
            name,
            f"{result.rate:g}" + (" (edge)" if result.at_edge else ""),
            steps_to_goal(result.runs),
            with_error(result.losses, 3),
            with_error(accuracies, 1) + " %",
            fewest_steps(result.tried),
            f"{spent[name]['ms']:.2f}",
            f"{spent[name]['bytes'] / 1024:,.0f}",
        ]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(task: Task, results: Mapping[str, Result], store: Store) -> str:
    """What docs/family.md has of a task: the table, and where its milliseconds were measured."""
    spent = store.costs(task.name)
    gradient = spent[""]
    took = f"The gradient takes {gradient['ms']:.2f} ms"
    where = f"{gradient['where']}; meanwhile others kept {gradient['others']:.1f} cores busy"
    return f"{table(task, results, spent)}\n\n{took} ({where})."


def picture(found: Mapping[str, Mapping[str, Result]], path: Path) -> None:
    """Final loss and its standard error, a panel for each task, the least on top."""
    plt = importlib.import_module("matplotlib.pyplot")
    colors = {"on everything": "#0072b2", "on what is hidden": "#d55e00"}
    figure, panels = plt.subplots(1, len(found), figsize=(12, 5), squeeze=False)
    for axes, (task, results) in zip(panels[0], found.items()):
        ordered = sorted(results, key=lambda name: mean(results[name].losses))
        for row, name in enumerate(ordered):
            losses = results[name].losses
            color = colors["on what is hidden" if "hidden" in name else "on everything"]
            axes.plot(losses, [row] * len(losses), "o", ms=3, color=color, alpha=0.4)
            error = standard_error(losses)
            axes.errorbar(mean(losses), row, xerr=error, fmt="s", ms=5, capsize=3, color=color)
        labels = [f"{name}  at {results[name].rate:g}" for name in ordered]
        axes.set_yticks(range(len(ordered)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(task)
        axes.set_xlabel("test loss at the end, at the best rate")
        axes.spines[["top", "right"]].set_visible(False)
    for label, color in colors.items():
        panels[0][0].plot([], [], "s", color=color, label=label)
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def study(store: Store, chosen: str, quick: bool) -> tuple[Task, dict[str, Result]]:
    """All runs of a task that the file lacks, and what all of them found."""
    names = list(QUICK if quick else METHODS)
    task = ensemble.TASKS[chosen](**({"steps": 4} if quick else {}))
    tuning, seeds = (1, 2) if quick else (TUNING[chosen], SEEDS)
    results = {}
    with tqdm(names, unit="method") as progress:
        for name in progress:
            progress.set_description(f"{chosen}: {name}")
            results[name] = sweep(store, task, name, METHODS[name], tuning, seeds, not quick)
    measure(store, task, {name: METHODS[name] for name in names}, quick)
    return task, results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="All recipes, each at its best rate of one grid.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=ensemble.TASKS, default=list(ensemble.TASKS))
    parser.add_argument("--quick", action="store_true", help="seconds: three methods, four steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.out / f"family{'-quick' if options.quick else ''}.jsonl")
    found, sections = {}, {}
    for chosen in options.tasks:
        task, found[chosen] = study(store, chosen, options.quick)
        sections[chosen] = section(task, found[chosen], store)
        print(f"\n{chosen}\n\n{sections[chosen]}")
    published = options.out == RESULTS and not options.quick and len(found) == len(ensemble.TASKS)
    if published:
        PAGE.write_text(filled(PAGE.read_text(), sections))
    picture(found, (PAGE.parent if published else options.out) / "family.png")


if __name__ == "__main__":
    main()
