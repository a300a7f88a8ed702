"""Whether fewer steps are less time: loss against the clock, `python -m benchmarks.clock`.

The text task of examples/train.py on a transformer large enough that the gradient takes most of a
step, as in a real training. Each method is tried at three rates with one seed, and the best of them
with two more. Runs that have a line in the results are not run again: about half an hour of
one core if none has. Writes the table of docs/family.md and a figure.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import funshampoo as fs
from benchmarks.page import filled
from benchmarks.study import Store
from benchmarks.text import CONTEXT, Text, pair, text
from examples.networks import Transformer

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs/family.md"

WIDTH, LAYERS, HEADS = 128, 4, 8
BATCH = 32  # windows
STEPS = 200
LOOK = 20  # steps between two looks at the test loss
SEEDS = 3
OTHER = 0.01  # the rate of AdamW for embeddings, head and vectors
BASE = "AdamW"


class Method(NamedTuple):
    """What hidden matrices are trained with.

    Attributes:
        recipe, options: of `for_model`.
        rates: a factor of two apart.
    """

    recipe: str
    rates: tuple[float, ...]
    options: dict[str, Any] = {}  # noqa: RUF012, never written to


METHODS = {
    BASE: Method("adamw", (0.0025, 0.005, 0.01)),
    "Shampoo, 1/4": Method("shampoo", (0.005, 0.01, 0.02), {"exponents": None, "beta3": None}),
    "Shampoo, 1/3": Method("shampoo", (0.005, 0.01, 0.02), {"exponents": 1 / 3, "beta3": None}),
    "Shampoo, 1/3, beta3 = beta1²": Method(
        "shampoo", (0.005, 0.01, 0.02), {"exponents": 1 / 3, "beta3": 0.81}
    ),
    "SOAP": Method("soap", (0.005, 0.01, 0.02), {"nesterov": False}),
    "SOAP, nesterov": Method("soap", (0.005, 0.01, 0.02), {"nesterov": True}),
    "KL-SOAP, nesterov": Method("kl_soap", (0.005, 0.01, 0.02), {"nesterov": True}),
    "eigenvalue-corrected, nesterov": Method(
        "eigenvalue_shampoo", (0.005, 0.01, 0.02), {"nesterov": True}
    ),
    "Muon": Method("muon", (0.02, 0.04, 0.08)),
}


class Run(NamedTuple):
    """One training.

    Attributes:
        losses: on the test set, after every `LOOK` steps.
        seconds: processor time of gradients and steps until then.
        step_ms: of the optimizer's part of a step, in the mean.
    """

    method: str
    rate: float
    seed: int
    losses: list[float]
    seconds: list[float]
    step_ms: float

    @property
    def final(self) -> float:
        """The loss at the end."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def train(name: str, rate: float, seed: int, data: Text) -> Run:
    """Linear warm-up over a tenth of the steps, then a cosine to zero; no weight decay."""
    torch.manual_seed(seed)
    model = Transformer(data.vocabulary, CONTEXT, WIDTH, LAYERS, HEADS)
    options: dict[str, Any] = {"weight_decay": 0.0, "other_options": {"weight_decay": 0.0}}
    options |= METHODS[name].options
    optimizer = fs.for_model(model, METHODS[name].recipe, lr=rate, other_lr=OTHER, **options)
    schedule = fs.schedules.warmup_cosine(1.0, STEPS // 10 + 1, STEPS + 1)
    scheduler = LambdaLR(optimizer, lambda t: float(schedule(torch.tensor(t))))
    losses, seconds, spent, stepping = [], [], 0.0, 0.0
    batches = itertools.islice(data.batches(BATCH, seed), STEPS)
    for t, (inputs, targets) in enumerate(batches, start=1):
        begun = time.process_time()
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        between = time.process_time()
        optimizer.step()
        ended = time.process_time()
        scheduler.step()
        spent, stepping = spent + ended - begun, stepping + ended - between
        if t % LOOK == 0:
            losses.append(test_loss(model, data))
            seconds.append(spent)
    return Run(name, rate, seed, losses, seconds, 1e3 * stepping / STEPS)


def test_loss(model: nn.Module, data: Text) -> float:
    inputs, targets = pair(data.test)
    with torch.no_grad():
        return cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).item()


def runs_of(store: Store, name: str) -> list[Run]:
    return [Run(**line) for line in store.lines if line["method"] == name]


def best(runs: Sequence[Run]) -> list[Run]:
    """The runs at the best rate, by the loss of the first seed at the end."""
    rate = min([run for run in runs if run.seed == 0], key=lambda run: run.final).rate
    return sorted([run for run in runs if run.rate == rate], key=lambda run: run.seed)


def carry_out(store: Store, data: Text, names: Sequence[str]) -> None:
    """All runs that have no line yet; methods take turns, so that busy hours hit all alike."""

    def missing(wanted: Sequence[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
        done = {(x["method"], x["rate"], x["seed"]) for x in store.lines}
        return [one for one in wanted if one not in done]

    def each(wanted: Sequence[tuple[str, float, int]], what: str) -> None:
        for name, rate, seed in tqdm(missing(wanted), desc=what, unit="run"):
            store.add([train(name, rate, seed, data)._asdict()])

    each([(n, METHODS[n].rates[i], 0) for i in range(3) for n in names], "rates")
    tuned = {n: best(runs_of(store, n))[0].rate for n in names}
    each([(n, tuned[n], seed) for seed in range(1, SEEDS) for n in names], "seeds")


def when(run: Run, goal: float) -> tuple[float, float] | None:
    """(steps, seconds) after which the loss is at most this, between two looks in proportion."""
    before = (0.0, 0.0, math.inf)
    for i, (loss, seconds) in enumerate(zip(run.losses, run.seconds), start=1):
        if loss <= goal:
            t, s, above = before
            part = (above - goal) / (above - loss) if math.isfinite(above) else 1.0
            return t + part * (i * LOOK - t), s + part * (seconds - s)
        before = (float(i * LOOK), seconds, loss)
    return None


def table(store: Store, names: Sequence[str]) -> str:
    """A row for each method, at its best rate: the mean loss, and what it takes to AdamW's."""
    tuned = {name: best(runs_of(store, name)) for name in names}
    base = tuned[BASE]
    rows = [
        f"| method | best rate | loss after {STEPS} steps | optimizer, ms a step | time of a step "
        "| steps to AdamW's loss | time to AdamW's loss |",
        "|---|---|---|---|---|---|---|",
    ]
    pace = median([run.seconds[-1] for run in base])
    for name, runs in sorted(tuned.items(), key=lambda item: mean([r.final for r in item[1]])):
        ends = [run.final for run in runs]
        reached = [when(run, goal.final) for run, goal in zip(runs, base)]
        known = [found for found in reached if found is not None]
        share = median([run.seconds[-1] for run in runs]) / pace
        steps, clock = "never by all", ""
        if len(known) == len(runs):
            steps = f"{mean([t for t, _ in known]) / STEPS:.2f}"
            clock = f"{mean([t for t, _ in known]) / STEPS * share:.2f}"
        rows.append(
            f"| {name} | {runs[0].rate:g} | {mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f}) "
            f"| {median([run.step_ms for run in runs]):.1f} | {share:.2f} | {steps} | {clock} |"
        )
    return "\n".join(rows)


def picture(store: Store, names: Sequence[str], path: Path) -> None:
    """Mean test loss of the seeds, against steps and against processor time."""
    plt = importlib.import_module("matplotlib.pyplot")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name in names:
        runs = best(runs_of(store, name))
        losses = [mean(values) for values in zip(*[run.losses for run in runs])]
        steps = [LOOK * i for i in range(1, len(losses) + 1)]
        # By the median pace of its runs: a busy minute of the machine is no property of a method.
        seconds = median([run.seconds[-1] for run in runs])
        style = {"label": name, "color": "black"} if name == BASE else {"label": name}
        panels[0].plot(steps, losses, **style)
        panels[1].plot([t * seconds / STEPS for t in steps], losses, **style)
    panels[0].set_xlabel("steps")
    panels[1].set_xlabel("seconds of one core")
    panels[0].set_ylabel("test loss")
    low = min(run.final for name in names for run in best(runs_of(store, name)))
    panels[0].set_ylim(low - 0.03, low + 0.8)
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Loss against the clock, on the text task.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lines", type=Path, default=RESULTS / "clock.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.lines)
    carry_out(store, text(torch.device("cpu")), options.methods)
    print(table(store, options.methods))
    if list(options.methods) == list(METHODS):
        PAGE.write_text(filled(PAGE.read_text(), {"clock": table(store, options.methods)}))
        picture(store, options.methods, PAGE.with_name("clock.png"))


if __name__ == "__main__":
    main()
