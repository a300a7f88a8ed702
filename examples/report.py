"""The results as a table to read and as numbers in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch

from runs import Summary, best
from tasks import Task

Results: TypeAlias = Mapping[str, Sequence[Summary]]

TITLES = {
    "shampoo": "Shampoo",
    "adamw": "AdamW",
    "sgd": "Nesterov SGD",
    "soap": "SOAP",
    "kl_shampoo": "KL-Shampoo",
    "kl_soap": "KL-SOAP",
    "muon": "Muon",
    "normuon": "NorMuon",
    "lion": "Lion",
    "sign_descent": "Sign descent",
    "spectral_descent": "Spectral descent",
    "eigenvalue_shampoo": "Eigenvalue-corrected Shampoo",
    "splus": "SPlus",
    "soap_muon": "SOAP-Muon",
    "record": "The record's stack",
}


def goal_of(task: Task) -> str:
    return f"{task.goal:.0%} accuracy" if task.measure == "accuracy" else f"loss {task.goal:g}"


def table(task: Task, results: Results) -> str:
    """A line for each optimizer, at its own best rate."""
    header = ["optimizer", "best rate", f"steps to {goal_of(task)}"]
    rows = [[*header, "final accuracy", "final loss", "ms per step"]]
    for optimizer, summaries in results.items():
        s = best(summaries)
        on_edge = len(summaries) > 1 and s in (summaries[0], summaries[-1])
        cells = [
            TITLES[optimizer],
            f"{s.rate:g}" + (" (edge of the grid)" if on_edge else ""),
            "never" if math.isinf(s.steps_to_goal) else f"{s.steps_to_goal:g}",
            f"{s.accuracy:.1%}",
            f"{s.test_loss:.3f}",
            f"{s.milliseconds:.1f}",
        ]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    title = f"{task.name}: {task.steps} steps, median of {task.seeds} seed(s), on the test examples"
    return "\n".join([title, "", *lines])


def write_numbers(task: Task, results: Results, path: Path) -> None:
    """Everything that was measured, as JSON."""
    content = {
        "task": task.name,
        "goal": goal_of(task),
        "torch": torch.__version__,
        "device": str(task.train.inputs.device),
        "threads": torch.get_num_threads(),
        "best_rate": {name: best(summaries).rate for name, summaries in results.items()},
        "results": {name: [asdict(s) for s in summaries] for name, summaries in results.items()},
    }
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(node: Any) -> Any:
    """JSON knows neither infinity ("never") nor NaN ("diverged"): both become null."""
    if isinstance(node, dict):
        return {key: finite(child) for key, child in node.items()}
    if isinstance(node, list):
        return [finite(child) for child in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
