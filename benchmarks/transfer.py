"""Whether a rate tuned on a narrow model serves a wider one: `python -m benchmarks.transfer`.

The text task of examples/train.py on transformers of three widths, each method at the same rates:
as they are, and with `scale_rates="mup"` from the narrowest. Writes a table, a figure and all
numbers. About ten minutes of one core; docs/transfer.md has the rules.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import funshampoo as fs
from benchmarks.text import CONTEXT, Text, pair, text
from examples.networks import Transformer

WIDTHS = (32, 64, 128)
HEAD = 16  # of an attention; wider models have more of them
BATCH = 8
# {method: rates at the narrowest width}, a factor of two apart
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "shampoo": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "soap": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "muon": (0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
}
OTHER = 0.01  # of embeddings, head and vectors


class Run(NamedTuple):
    """One training, and the test loss at its end."""

    method: str
    width: int
    scaled: bool
    rate: float
    loss: float


def network(vocabulary: int, width: int) -> nn.Module:
    return Transformer(vocabulary, CONTEXT, width, layers=2, heads=width // HEAD)


def train(method: str, width: int, scaled: bool, rate: float, steps: int, data: Text) -> Run:
    """Linear warm-up over a tenth of the steps, then a cosine to zero; no weight decay."""
    torch.manual_seed(0)
    model = network(data.vocabulary, width)
    options: dict[str, Any] = {"weight_decay": 0.0, "other_options": {"weight_decay": 0.0}}
    options |= {"shampoo": {"beta3": None}, "soap": {"nesterov": False}}.get(method, {})
    if scaled:
        with torch.device("meta"):
            options |= {"scale_rates": "mup", "base": network(data.vocabulary, WIDTHS[0])}
    optimizer = fs.for_model(model, method, lr=rate, other_lr=OTHER, **options)
    schedule = fs.schedules.warmup_cosine(1.0, steps // 10 + 1, steps + 1)
    scheduler = LambdaLR(optimizer, lambda t: float(schedule(torch.tensor(t))))
    for inputs, targets in itertools.islice(data.batches(BATCH, seed=0), steps):
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        inputs, targets = pair(data.test)
        final = cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).item()
    return Run(method, width, scaled, rate, final if math.isfinite(final) else math.inf)


def table(runs: Sequence[Run]) -> str:
    """For each method, width and way the best rate, and the loss at the narrowest's best."""
    lines = [
        "| method | width | rates | best rate | loss there | loss at the narrowest model's best |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run.method for run in runs):
        tuned = best([r for r in runs if r.method == method and r.width == WIDTHS[0]]).rate
        for width, scaled in itertools.product(WIDTHS, (False, True)):
            mine = [r for r in runs if r[:3] == (method, width, scaled)]
            if mine:
                way = "tuned" if width == WIDTHS[0] else "mup" if scaled else "as they are"
                (kept,) = [r.loss for r in mine if r.rate == tuned]
                found = best(mine)
                cells = [method, width, way, f"{found.rate:g}", f"{found.loss:.3f}", f"{kept:.3f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def best(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.loss)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Final loss against the rate, a panel for each method and way, a line for each width."""
    plt = importlib.import_module("matplotlib.pyplot")
    methods = list(dict.fromkeys(run.method for run in runs))
    shape = {"sharey": "col", "figsize": (3.2 * len(methods), 5.5), "squeeze": False}
    figure, rows = plt.subplots(2, len(methods), **shape)
    for (i, scaled), (j, method) in itertools.product(enumerate((False, True)), enumerate(methods)):
        axes = rows[i][j]
        for width in WIDTHS:
            way = scaled and width != WIDTHS[0]  # at the narrowest both are the same
            mine = [r for r in runs if r[:3] == (method, width, way)]
            axes.plot([r.rate for r in mine], [r.loss for r in mine], "o-", label=f"width {width}")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{method}, {'mup' if scaled else 'rates as they are'}", fontsize=9)
        axes.set_xlabel("learning rate at width 32" if scaled else "learning rate")
        low = min(r.loss for r in runs if r.method == method)
        axes.set_ylim(low - 0.05, low + 1.2)
    rows[0][0].set_ylabel("test loss")
    rows[1][0].set_ylabel("test loss")
    rows[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rates over width, on the text task.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results/")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = text(torch.device("cpu"))
    runs = []
    for method, width, scaled in itertools.product(options.methods, WIDTHS, (False, True)):
        if width == WIDTHS[0] and scaled:
            continue
        for rate in RATES[method]:
            runs.append(train(method, width, scaled, rate, options.steps, data))
            print(*runs[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = {"steps": options.steps, "runs": [run._asdict() for run in runs]}
    (options.out / "transfer.json").write_text(json.dumps(numbers, indent=1) + "\n")
    picture(runs, options.out / "transfer.png")
    print(f"\n{table(runs)}\n\nwrote {options.out}/transfer.json and transfer.png")


if __name__ == "__main__":
    main()
