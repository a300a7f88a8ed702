"""Plain steps as graphs beside the same without. Last, for a graph can take long to make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optree
import torch

import funshampoo as fs
from benchmarks.device.clock import read, summary, turns
from benchmarks.device.counts import demands
from benchmarks.device.family import MODEL, SIZE, chains
from benchmarks.device.group import Cell, Row, Setting
from benchmarks.device.steps import Ours, tensors_of

COMPILING = 25.0  # seconds to be left before a graph is begun: it can't be interrupted
NAMES = ("adamw", "shampoo", "soap", "muon, bfloat16")
REPLAYED = ("shampoo", "adamw")  # once more, with torch.compile's CUDA graphs


def cells(setting: Setting) -> Iterator[Cell]:
    """One for every method; then with mode="reduce-overhead"."""
    size, least = setting.pick(SIZE, 32), setting.pick(COMPILING, 2.0)
    for name in setting.pick(NAMES, NAMES[:1]):
        yield Cell(f"{MODEL}, blocks of {size}", partial(_cell, name, {}, size, setting), least)
    for name in setting.pick(REPLAYED, ()):
        run = partial(_cell, name, {"mode": "reduce-overhead"}, size, setting)
        yield Cell(f"{MODEL}, blocks of {size}, reduce-overhead", run, least)


def _cell(name: str, options: dict[str, Any], size: int, setting: Setting) -> Iterator[Row]:
    params, grads = tensors_of(MODEL, setting)
    # Without a compiler for the host, as in a rehearsal, the graph is run as it was traced.
    options = setting.pick(options, {"backend": "aot_eager"})
    make = partial(_chain, name, size)
    graph = Ours(fs.in_tf32(fs.compiled(make(), **options)), params, grads)
    eager = Ours(fs.in_tf32(make()), params, grads)
    if "mode" in options:  # else it would copy what lies elsewhere at the next step
        for x in optree.tree_leaves((params, grads, graph.state)):
            if isinstance(x, torch.Tensor) and x.is_cuda:
                torch._dynamo.mark_static_address(x)
    first, _ = read(graph.step, setting.device)
    yield {"of": f"{name}, TF32, compiled", "kind": "making the graph", "s": first.host}
    steps: dict[str, Callable[[], Any]] = {
        f"{name}, TF32, compiled": graph.step,
        f"{name}, TF32": eager.step,
    }
    seconds = min(setting.pick(2.0, 0.2), setting.left() / 3)
    for of, found in turns(steps, setting.device, seconds=seconds, least=3).items():
        row = {"of": of, "kind": "plain"} | summary(found)
        yield row | demands(steps[of], setting.device, eager=not of.endswith("compiled"))


def _chain(name: str, size: int) -> fs.GradientTransformation:
    return chains(size)[name]
