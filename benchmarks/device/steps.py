"""The optimizer's step on the shapes of two models: plain, with a refresh, and compiled."""

from __future__ import annotations

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
from funshampoo.plan.shapes import model_shapes

PLACES = (("gpt2", 1024), ("gpt2", 256), ("resnet-50", 1024), ("resnet-50", 256))
LR = 1e-4
REFRESHES = 3
COMPILING = 25.0  # seconds to be left before a graph is begun: it can't be interrupted

Tensors = dict[str, Tensor]


def cells(setting: Setting) -> Iterator[Cell]:
    """Plain steps and refreshes first; graphs, which take long to make, last."""
    places = setting.pick(PLACES, (("gpt2", 32), ("resnet-50", 16)))
    for model, size in places:
        run = partial(_eager, model, size, setting)
        yield Cell(f"{model}, blocks of {size}", run, setting.pick(10.0, 2.0))
    for model, size in places:
        run = partial(_compiled, model, size, setting)
        yield Cell(f"{model}, blocks of {size}, compiled", run, setting.pick(COMPILING, 2.0))


class Ours:
    """A chain, its state, and the parameters that it changes in their places."""

    def __init__(self, tx: fs.GradientTransformation, params: Tensors, grads: Tensors) -> None:
        self.tx, self.params, self.grads = tx, params, grads
        self.state = tx.init(params)

    def step(self, refresh: bool = False) -> None:
        """One that consumes the state."""
        self.state = fs.update_in_place(
            self.tx, self.grads, self.state, self.params, refresh=refresh
        )


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
    """As many as there is time for; none where not even one would be done in time."""
    expected = expected_refresh(ours.params, size, setting.device)
    head: Row = {"of": "shampoo", "kind": "refresh", "expected_s": expected}
    if expected > 0.6 * setting.left():
        yield head | {"skipped": f"{setting.left():.0f} s left"}
        return
    readings = []
    for _ in range(REFRESHES):
        readings.append(read(lambda: ours.step(refresh=True), setting.device)[0])
        if 2 * readings[-1].device > 0.2 * setting.left():
            break
    row = head | summary(readings) | {"cold": len(readings) == 1}
    if 3 * readings[-1].device < 0.1 * setting.left():
        row |= demands(lambda: ours.step(refresh=True), setting.device)
    yield row


def expected_refresh(params: Tensors, size: int, device: torch.device) -> float:
    """Seconds: eigendecompositions one after the other, of which one of each side is tried."""
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in params.items()}
    statistics = fs.blocked(fs.kronecker_statistics(0.99), size, merge="small", keep=2)
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


def _compiled(model: str, size: int, setting: Setting) -> Iterator[Row]:
    """A plain step as a graph beside the same without."""
    params, grads = tensors_of(model, setting)
    # Without a compiler for the host, as in a rehearsal, the graph is run as it was traced.
    options = setting.pick({}, {"backend": "aot_eager"})
    graph = Ours(fs.compiled(fs.shampoo(LR, max_size=size), **options), params, grads)
    eager = Ours(fs.shampoo(LR, max_size=size), params, grads)
    first, _ = read(graph.step, setting.device)
    yield {"of": "shampoo, compiled", "kind": "making the graph", "s": first.host}
    steps = {"shampoo, compiled": graph.step, "shampoo": eager.step}
    seconds = min(setting.pick(2.0, 0.2), setting.left() / 3)
    for name, found in turns(steps, setting.device, seconds=seconds, least=3).items():
        row = {"of": name, "kind": "plain"} | summary(found)
        yield row | demands(steps[name], setting.device, eager=name == "shampoo")


def tensors_of(model: str, setting: Setting) -> tuple[Tensors, Tensors]:
    """Parameters and gradients of a model's shapes, at random; in a rehearsal a corner of it."""
    shapes = model_shapes(model)
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
