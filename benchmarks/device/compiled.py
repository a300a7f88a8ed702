"""A plain step as a graph beside the same without. Last, for a graph can take long to make."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import funshampoo as fs
from benchmarks.device.clock import read, summary, turns
from benchmarks.device.counts import demands
from benchmarks.device.group import Cell, Row, Setting
from benchmarks.device.steps import LR, PLACES, SMALL, Ours, tensors_of

COMPILING = 25.0  # seconds to be left before a graph is begun: it can't be interrupted


def cells(setting: Setting) -> Iterator[Cell]:
    """One for every model and block size."""
    for model, size in setting.pick(PLACES, SMALL[:1]):
        run = partial(_cell, model, size, setting)
        yield Cell(f"{model}, blocks of {size}", run, setting.pick(COMPILING, 2.0))


def _cell(model: str, size: int, setting: Setting) -> Iterator[Row]:
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
