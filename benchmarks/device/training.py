"""The text task's transformer at a width that a GPU notices: losses, and ms a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funshampoo as fs
from benchmarks.device.clock import Reading, read, summary
from benchmarks.device.group import Cell, Row, Setting
from benchmarks.text import CONTEXT, Text, pair, text
from benchmarks.works import loss_of
from examples.networks import Transformer

WIDTH, HEADS, LAYERS = 512, 8, 2
BATCH = 64
STEPS = 200
WARMUP = 20
EVERY = 20  # steps between refreshes
MILESTONES = (50, 100, 200)
RATES: dict[str, tuple[float, float, float]] = {
    "shampoo": (0.003, 0.01, 0.001),
    "soap": (0.003, 0.001, 0.01),
    "AdamW": (0.001, 0.003, 0.0003),
    "Muon and AdamW": (0.02, 0.04, 0.01),
}
"""The first of each in the first cell, and so on: the best can only be told of what was tried."""

Step = Callable[[float], None]


class Run(NamedTuple):
    """One training.

    Attributes:
        network: what is trained.
        step: the optimizer's, at a share of its learning rate.
        passes, steps: readings of forward and backward, and of the optimizer.
    """

    network: nn.Module
    step: Step
    passes: list[Reading]
    steps: list[Reading]


def cells(setting: Setting) -> Iterator[Cell]:
    """A cell for every place in the lists of rates: in it all optimizers take turns."""
    for i in range(setting.pick(3, 1)):
        rates = {name: of[i] for name, of in RATES.items()}
        yield Cell(f"rates {i + 1}", partial(_cell, rates, setting), setting.pick(25.0, 2.0))


def _cell(rates: dict[str, float], setting: Setting) -> Iterator[Row]:
    steps = setting.pick(STEPS, 20)
    milestones = setting.pick(MILESTONES, (10, 20))
    data = text(setting.device)
    builders: dict[str, Callable[..., Step]] = {
        "shampoo": partial(_ours, fs.shampoo),
        "shampoo, graphs, TF32": partial(_ours, fs.shampoo, cuda_graph=True, tf32=True),
        "soap": partial(_ours, fs.soap),
        "soap, graphs, TF32": partial(_ours, fs.soap, cuda_graph=True, tf32=True),
        "AdamW": _adamw,
        "Muon and AdamW": _muon,
    }
    if not hasattr(torch.optim, "Muon"):
        del builders["Muon and AdamW"]
    runs = {
        name: _begun(data, partial(build, rate=rates[name.split(",")[0]]), setting)
        for name, build in builders.items()
    }
    batches = data.batches(setting.pick(BATCH, 8), seed=0)
    for t in range(1, steps + 1):
        if setting.left() < 3:
            yield {"stopped": f"after {t - 1} steps, for time"}
            break
        batch = next(batches)
        for run in runs.values():
            _step(run, batch, _share(t, steps), setting.device)
        if t in milestones:
            for name, run in runs.items():
                head = {"of": name, "rate": rates[name.split(",")[0]], "steps": t}
                yield head | _found(run, data, setting.pick(100, 8))


def _step(run: Run, batch: tuple[Tensor, Tensor], share: float, device: torch.device) -> None:
    def passes() -> None:
        for p in run.network.parameters():
            p.grad = None
        loss_of(run.network, batch).backward()

    run.passes.append(read(passes, device)[0])
    run.steps.append(read(lambda: run.step(share), device)[0])


def _share(t: int, steps: int) -> float:
    """Of the learning rate: a rise over the first tenth, then half a cosine, on every step."""
    warmup = min(WARMUP, steps // 10)
    if t <= warmup:
        return t / warmup
    return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup + 1)))


def _found(run: Run, data: Text, tests: int) -> Row:
    """Test loss, and times from the third step on: plain steps and, if any, refreshes."""
    with torch.no_grad():
        loss = float(loss_of(run.network, pair(data.test[:tests])))
    later = list(enumerate(run.steps, start=1))[2:]
    plain = summary([r for t, r in later if t % EVERY])
    refresh = summary([r for t, r in later if t % EVERY == 0] or run.steps[:1])
    passes = summary(run.passes[2:])
    # The mean over an interval of medians: hiccups of a shared machine are left out.
    mean = ((EVERY - 1) * plain["ms"] + refresh["ms"]) / EVERY
    return {
        "test_loss": loss,
        "ms_a_step": passes["ms"] + mean,
        "passes_ms": passes["ms"],
        "plain_ms": [plain["ms_low"], plain["ms"], plain["ms_high"]],
        f"every_{EVERY}th_ms": [refresh["ms_low"], refresh["ms"], refresh["ms_high"]],
        "plain_host_ms": plain["host_ms"],
    }


def _begun(data: Text, build: Callable[[nn.Module], Step], setting: Setting) -> Run:
    torch.manual_seed(0)
    width, heads = setting.pick((WIDTH, HEADS), (32, 2))
    network = Transformer(data.vocabulary, CONTEXT, width, LAYERS, heads).to(setting.device)
    return Run(network, build(network), [], [])


def _ours(recipe: Any, network: nn.Module, rate: float, **options: Any) -> Step:
    optimizer = fs.Optimizer(network.named_parameters(), recipe, lr=rate, every=EVERY, **options)
    return _scheduled(rate, optimizer)


def _adamw(network: nn.Module, rate: float) -> Step:
    options: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    return _scheduled(rate, torch.optim.AdamW(network.parameters(), rate, **options))


def _muon(network: nn.Module, rate: float) -> Step:
    """Muon for the matrices between the first and the last, AdamW at its own rate for the rest."""
    inner = [p for name, p in network.named_parameters() if p.ndim == 2 and "blocks" in name]
    ids = {id(p) for p in inner}
    others = [p for p in network.parameters() if id(p) not in ids]
    adamw_rate = RATES["AdamW"][0]
    muon = _scheduled(rate, torch.optim.Muon(inner, rate, weight_decay=0.0))
    adamw = _scheduled(
        adamw_rate,
        torch.optim.AdamW(others, adamw_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    )

    def step(share: float) -> None:
        muon(share)
        adamw(share)

    return step


def _scheduled(rate: float, optimizer: torch.optim.Optimizer) -> Step:
    def step(share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.step()

    return step
