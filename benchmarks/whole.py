"""The whole training step, with Shampoo and with AdamW."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import funshampoo
from benchmarks.methods import BASELINE, BETAS, COMPILED, LOW_PRECISION, LR, OURS
from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.timing import Contender, Run, interleave, times, times_of
from benchmarks.works import CONVNET, TRANSFORMER, Work, loss_of

EVERY = 20
SIZE = 256
EXAMPLES = {TRANSFORMER.name: 64, CONVNET.name: 128}
INTERVALS = {TRANSFORMER.name: 1, CONVNET.name: 4}

ABOUT = f"""Forward, backward and optimizer's step. Shampoo at block size {SIZE}, a refresh every
{EVERY} steps; the optimizers took turns, step by step, over whole intervals. The optimizer's time
is the mean over an interval (of medians: {EVERY - 1} plain steps and a refresh); forward and
backward is the median of all trainings'. The ratio is of the sums. "As run" is the ratio of the
plain sums of all seconds, hiccups of the machine included."""


def section(settings: Settings) -> Section:
    """A cell for each network."""
    works = (CONVNET,) if settings.quick else (TRANSFORMER, CONVNET)
    columns = [
        Column("work", "training"),
        Column("method", "Shampoo"),
        Column("passes", "forward and backward, ms", "ms"),
        Column("adamw", "AdamW foreach, ms", "ms"),
        Column("plain", "Shampoo plain, ms", "ms"),
        Column("refresh", "refresh, ms", "ms"),
        Column("mean", "mean, ms", "number"),
        Column("ratio", "Shampoo / AdamW", "number"),
        Column("as_run", "as run", "number"),
    ]
    cells = [Cell(work.name, _cell(work, settings)) for work in works]
    return Section("whole", "The whole training step", ABOUT, columns, cells)


def _cell(work: Work, settings: Settings) -> Callable[[], Rows]:
    def run() -> Rows:
        examples, intervals = EXAMPLES[work.name], INTERVALS[work.name]
        if settings.quick:
            examples, intervals = examples // 4, 1
        builders = {BASELINE: _adamw, **OPTIONS}
        if settings.quick:  # compiling takes longer than that
            builders = {name: b for name, b in builders.items() if not name.startswith(COMPILED)}
        elif work is TRANSFORMER:  # whose passes take a second
            del builders[COMPILED]
        contenders = [
            contender
            for name, build in builders.items()
            for contender in _training(work, examples, name, build, settings.device)
        ]
        runs = interleave(
            contenders,
            device=settings.device,
            seconds=0.0,
            least={},
            warmup=3,
            steps=intervals * EVERY,
        )
        label = f"{work.name}, {examples} examples"
        return [
            {"work": label, "method": name, **_summary(runs, name)}
            for name in builders
            if name != BASELINE
        ]

    return run


def _training(
    work: Work,
    examples: int,
    name: str,
    build: Callable[[Any], torch.optim.Optimizer],
    device: torch.device,
) -> list[Contender]:
    """Two contenders that take turns in training one network: its passes, and the optimizer."""
    assert work.network is not None
    assert work.batch is not None
    torch.manual_seed(0)
    network = work.network().to(device)
    optimizer = build(network.parameters())
    inputs, targets = (x.to(device) for x in work.batch(examples))

    def passes() -> None:
        optimizer.zero_grad()
        loss_of(network, (inputs, targets)).backward()

    def kind(t: int) -> str:
        return "refresh" if name != BASELINE and (t == 1 or t % EVERY == 0) else "plain"

    kinds = ("plain", "refresh") if name != BASELINE else ("plain",)
    return [
        Contender(f"passes {name}", passes),
        Contender(name, optimizer.step, kind=kind, kinds=kinds),
    ]


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, LR, foreach=True)


def _shampoo(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: funshampoo.Shampoo(
        params, LR, BETAS, every=EVERY, max_size=SIZE, **options
    )


OPTIONS = {
    OURS: _shampoo(),
    LOW_PRECISION: _shampoo(product_dtype=torch.bfloat16),
    COMPILED: _shampoo(compile=True),
    f"{COMPILED}, bfloat16 products": _shampoo(compile=True, product_dtype=torch.bfloat16),
}


def _summary(runs: list[Run], name: str) -> dict[str, Any]:
    passes = times(run.seconds for run in runs if run.contender.startswith("passes"))
    adamw, plain = times_of(runs, BASELINE), times_of(runs, name)
    refresh = times_of(runs, name, "refresh")
    mean = ((EVERY - 1) * plain.median + refresh.median) / EVERY
    sums = {
        who: statistics.fsum(r.seconds for r in runs if r.contender in (who, f"passes {who}"))
        for who in (BASELINE, name)
    }
    return {
        "passes": passes.in_ms,
        "adamw": adamw.in_ms,
        "plain": plain.in_ms,
        "refresh": refresh.in_ms,
        "mean": 1e3 * mean,
        "ratio": (passes.median + mean) / (passes.median + adamw.median),
        "as_run": sums[name] / sums[BASELINE],
    }
