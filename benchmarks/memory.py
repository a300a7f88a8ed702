"""Bytes of state, and of what a step needs beside it."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import funshampoo as fs
from benchmarks.methods import BASELINE, DIAGONAL, METHODS, OURS
from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.works import CONVNET, GPT2, MLP, RESNET, TRANSFORMER, Work

OPTIONS = {OURS: {"vectors": "blocks"}, DIAGONAL: {"vectors": "diagonal"}}

ABOUT = """State: all tensors that the optimizer keeps (funshampoo.state.summary for ours). Peak:
the most that a step holds beside what was there when it began, on a CPU by the profiler's record
of torch's allocations (not those inside MKL; freeing older memory is not subtracted), on a GPU by
torch.cuda.max_memory_allocated. Of the GPT-2 shapes the state is counted, without a step."""


def section(settings: Settings) -> Section:
    """A cell for every work and block size."""
    works = (MLP, CONVNET) if settings.quick else (MLP, TRANSFORMER, CONVNET, RESNET)
    sizes = (256,) if settings.quick else (1024, 256)
    cells = [
        Cell(f"{work.name}, blocks of {size}", _cell(work, size, size == sizes[0], settings))
        for work in works
        for size in sizes
    ]
    cells += [Cell(f"{GPT2.name}, blocks of {size}", _counted(GPT2, size)) for size in sizes]
    columns = [
        Column("work", "work"),
        Column("size", "block size"),
        Column("method", "method"),
        Column("parameters", "parameters", "bytes"),
        Column("state", "state", "bytes"),
        Column("state_ratio", "× parameters", "number"),
        Column("plain", "peak, plain step", "bytes"),
        Column("plain_ratio", "× parameters", "number"),
        Column("refresh", "peak, refresh", "bytes"),
        Column("note", ""),
    ]
    return Section("memory", "Memory", ABOUT, columns, cells)


def _cell(work: Work, size: int, first: bool, settings: Settings) -> Callable[[], Rows]:
    def run() -> Rows:
        rows: Rows = []
        for method in METHODS:
            chosen = method.name in (BASELINE, *OPTIONS)
            chosen |= method.name.startswith(("DASH", "ref"))
            slow = method.name.startswith("DASH") and work is RESNET
            if not chosen or slow or not (first or method.blocks):
                continue
            params = work.parameters(settings.device)
            parameters = _bytes(params)
            row: dict[str, Any] = {"work": work.name, "method": method.name}
            row |= {"size": size if method.blocks else None, "parameters": parameters}
            rows.append(row)
            try:
                peaks, state = _measured(method, params, size, work, settings.device)
            except ImportError as error:
                row["note"] = f"not installed ({error.name})"
                continue
            except Exception as error:  # another project's optimizer, with a work it can't do
                row["note"] = f"does not run here: {type(error).__name__}"
                settings.log(f"{method.name}: {error}")
                continue
            row |= peaks | {"state": state, "state_ratio": state / parameters}
            row["plain_ratio"] = peaks["plain"] / parameters
        return rows

    return run


def _measured(
    method: Any, params: Any, size: int, work: Work, device: torch.device
) -> tuple[dict[str, int], int]:
    """Peaks of a plain step and of a refresh, after the first of each; bytes of state."""
    optimizer = method.build(params, size)
    (gradients,) = work.gradients(device, 1)
    peaks: dict[str, int] = {}
    wanted = {"plain", "refresh"} if method.refreshes else {"plain"}
    for t in itertools.count(1):
        for p, g in zip(params.values(), gradients):
            p.grad = g
        kind = "refresh" if method.refreshes and method.refreshes(t) else "plain"
        if t >= max(2, method.ready) and kind not in peaks:  # the first step makes the state
            peaks[kind] = peak_bytes(optimizer.step, device)
        else:
            optimizer.step()
        if wanted <= peaks.keys():
            break
    if method.name in OPTIONS:
        shapes = {name: tuple(p.shape) for name, p in params.items()}
        return peaks, own_state_bytes(shapes, size, **OPTIONS[method.name])
    return peaks, _bytes(optimizer.state)


def own_state_bytes(shapes: Mapping[str, tuple[int, ...]], size: int, **options: Any) -> int:
    """Of funshampoo.shampoo; nothing is allocated for it."""
    params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state = fs.shampoo(1e-3, max_size=size, **options).init(params)
    return fs.state.summary(state, file=io.StringIO()).total


def _counted(work: Work, size: int) -> Callable[[], Rows]:
    def run() -> Rows:
        shapes = work.sizes()
        parameters = 4 * sum(map(math.prod, shapes.values()))
        row = {"work": work.name, "size": size, "parameters": parameters}
        totals = {name: own_state_bytes(shapes, size, **own) for name, own in OPTIONS.items()}
        return [
            row | {"method": name, "state": total, "state_ratio": total / parameters}
            for name, total in totals.items()
        ]

    return run


def _bytes(tree: Any) -> int:
    """Of all tensors in nested containers, each once."""
    found: dict[tuple[Any, ...], int] = {}

    def walk(node: Any) -> None:
        if isinstance(node, Tensor):
            key = (node.data_ptr(), node.shape, node.stride())
            found[key] = node.numel() * node.element_size()
        elif isinstance(node, Mapping):
            for value in node.values():
                walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                walk(value)
        elif hasattr(node, "__dict__") and not callable(node):
            walk(vars(node))

    walk(tree)
    return sum(found.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes held at once during a step, above those held when it began."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop
    # acc_events: there is one cycle, and torch 2.11 warns that it keeps no others.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
