"""The optimizer's step on the shapes of two models: plain, and with a refresh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

import funshampoo as fs
from benchmarks.device.clock import read, summary, turns, working
from benchmarks.device.counts import demands, held_mib
from benchmarks.device.group import Cell, Row, Setting
from benchmarks.device.products import tf32
from benchmarks.text import CONTEXT
from examples.networks import Transformer
from funshampoo import linalg
from funshampoo.plan.shapes import model_shapes

PLACES = (("gpt2", 1024), ("resnet-50", 1024), ("resnet-50", 256), ("gpt2", 256))
TEXT = (512, 2, 8)  # width, layers, heads
TEXT_CHARACTERS = 96
SMALL = (("gpt2", 32), ("resnet-50", 16))
LR = 1e-4
REFRESHES = 3
EPSILON = 1e-6
SOLVERS = {
    "newton_schulz": linalg.newton_schulz(relative_epsilon=EPSILON),
    "newton_schulz, TF32": linalg.newton_schulz(relative_epsilon=EPSILON),
    "coupled_newton": linalg.coupled_newton(relative_epsilon=EPSILON),
}

Tensors = dict[str, Tensor]


def cells(setting: Setting) -> Iterator[Cell]:
    """One for every model and block size."""
    for model, size in setting.pick(PLACES, SMALL):
        run = partial(_eager, model, size, setting)
        yield Cell(f"{model}, blocks of {size}", run, setting.pick(10.0, 2.0))


class Ours:
    """A chain, its state, and the parameters that it changes in their places."""

    def __init__(self, tx: fs.GradientTransformation, params: Tensors, grads: Tensors) -> None:
        self.tx, self.params, self.grads = tx, params, grads
        self.state = tx.init(params)

    def step(self) -> None:
        """A plain one. It consumes the state."""
        self._step(self.tx, refresh=False)

    def refresh(self, tx: fs.GradientTransformation) -> None:
        """One with a refresh, of a chain that differs in its root solver alone."""
        self._step(tx, refresh=True)

    def _step(self, tx: fs.GradientTransformation, refresh: bool) -> None:
        self.state = fs.update_in_place(tx, self.grads, self.state, self.params, refresh=refresh)


def _eager(model: str, size: int, setting: Setting) -> Iterator[Row]:
    device = setting.device
    params, grads = tensors_of(model, setting)
    ours = {
        "shampoo": Ours(fs.shampoo(LR, max_size=size), params, grads),
        "shampoo, bfloat16 products": Ours(
            fs.shampoo(LR, max_size=size, product_dtype=torch.bfloat16), params, grads
        ),
    }
    theirs = _theirs(params, grads)
    steps: dict[str, Callable[[], Any]] = {name: o.step for name, o in ours.items()}
    steps |= {name: optimizer.step for name, optimizer in theirs.items()}
    steps, errors = working(steps)
    yield from errors
    seconds = min(setting.pick(3.0, 0.3), setting.left() / 3)
    readings = turns(steps, device, seconds=seconds, least=3)
    for name, found in readings.items():
        held = ours[name].state if name in ours else _state(theirs[name])
        yield {
            "of": name,
            "kind": "plain",
            "parameters": sum(p.numel() for p in params.values()),
            **summary(found),
            **demands(steps[name], device),
            "state_mib": held_mib(held),
        }
    del ours["shampoo, bfloat16 products"], theirs, steps
    yield from _refreshes(ours["shampoo"], size, setting)


def _refreshes(ours: Ours, size: int, setting: Setting) -> Iterator[Row]:
    """With every solver, as many as there is time for; by eigh last, which may take long."""
    for name, solver in SOLVERS.items():
        tx = fs.shampoo(LR, max_size=size, solver=solver)
        context = tf32() if name.endswith("TF32") else contextlib.nullcontext()
        with context:
            row = refreshed(ours, tx, setting)
        yield {"of": f"shampoo, {name}", "kind": "refresh"} | row
    expected = expected_refresh(ours.params, size, setting.device)
    head: Row = {"of": "shampoo, eigh", "kind": "refresh", "one_by_one_s": expected}
    if expected > 0.6 * setting.left():
        yield head | {"skipped": f"{setting.left():.0f} s left"}
    else:
        yield head | refreshed(ours, ours.tx, setting)


def refreshed(
    ours: Ours, tx: fs.GradientTransformation, setting: Setting, share: float = 0.05
) -> Row:
    """Steps with a refresh. The first is cold where it is the only one that there was time for.

    Args:
        share: of the time that is left, which one may take for there to be another.
    """
    readings = []
    for _ in range(REFRESHES + 1):
        readings.append(read(lambda: ours.refresh(tx), setting.device)[0])
        if readings[-1].device > share * setting.left():
            break
    later = readings[1:]
    row = summary(later or readings) | ({} if later else {"cold": True})
    if readings[-1].device < 0.4 * share * setting.left():
        row |= demands(lambda: ours.refresh(tx), setting.device)
    return row


def expected_refresh(params: Tensors, size: int, device: torch.device) -> float:
    """Seconds: eigendecompositions one after the other, of which one of each side is tried."""
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in params.items()}
    statistics = fs.blocked(fs.kronecker_statistics(0.99, exponents={1: 0.0}), size)
    counts: dict[int, int] = {}
    for x in optree.tree_leaves(statistics.init(shapes)):
        if isinstance(x, Tensor) and x.ndim == 3:
            counts[x.shape[-1]] = counts.get(x.shape[-1], 0) + x.shape[0]
    expected = 0.0
    for side, count in counts.items():
        if side * count * side < 2**16:
            continue  # too little to matter
        x = torch.randn(side, side, device=device)
        A = x @ x.mT
        seconds = min(read(lambda A=A: torch.linalg.eigh(A), device)[0].device for _ in range(2))
        expected += count * seconds
    return expected


def tensors_of(model: str, setting: Setting) -> tuple[Tensors, Tensors]:
    """Parameters and gradients of a model's shapes, at random; in a rehearsal a corner of it.

    "text": of the transformer that is trained in `benchmarks.device.training`.
    """
    shapes = _text_shapes() if model == "text" else model_shapes(model)
    if setting.rehearse:
        first = list(shapes.items())[:12]
        shapes = {name: tuple(min(side, 48) for side in shape) for name, shape in first}
    make = torch.Generator(setting.device).manual_seed(0)

    def drawn(scale: float) -> Tensors:
        return {
            name: scale * torch.randn(shape, generator=make, device=setting.device)
            for name, shape in shapes.items()
        }

    return drawn(0.02), drawn(1.0)


def _text_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = Transformer(TEXT_CHARACTERS, CONTEXT, *TEXT)
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def _theirs(params: Tensors, grads: Tensors) -> dict[str, torch.optim.Optimizer]:
    """On parameters of their own, whose gradients are the same memory."""
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    for name, p in leaves.items():
        p.grad = grads[name]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW, fused": torch.optim.AdamW(leaves.values(), LR, fused=True)
    }
    matrices = [p for p in leaves.values() if p.ndim == 2]
    share = sum(p.numel() for p in matrices) / sum(p.numel() for p in leaves.values())
    if hasattr(torch.optim, "Muon") and matrices:
        name = f"Muon (of {math.floor(100 * share)} % of the parameters)"
        optimizers[name] = torch.optim.Muon(matrices, LR, weight_decay=0.0)
    return optimizers


def _state(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [list(entry.values()) for entry in optimizer.state.values()]
