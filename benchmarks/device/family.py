"""Other methods than Shampoo on GPT-2's shapes: plain, with a refresh, and as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optree
import torch

import funshampoo as fs
from benchmarks.device.clock import summary, turns, working
from benchmarks.device.counts import demands, held_mib
from benchmarks.device.group import Cell, Row, Setting, in_a_line
from benchmarks.device.steps import LR, Ours, Tensors, refreshed, tensors_of

MODEL, SIZE = "gpt2", 1024
GRAPHED = ("shampoo, TF32", "soap, TF32", "adamw", "muon, bfloat16")
GRAPHED_MODELS = ("text", MODEL, "resnet-50")
ROUNDED = ("shampoo", "soap", "kl_shampoo", "eigenvalue_shampoo", "muon")


def chains(size: int) -> dict[str, fs.GradientTransformation]:
    """By name; Muon on all matrices, embeddings too, as torch.optim's in the steps."""
    bf16 = torch.bfloat16
    found = {
        "adamw": fs.adamw(LR),
        "shampoo": fs.shampoo(LR, max_size=size),
        "soap": fs.soap(LR, max_size=size),
        "kl_shampoo": fs.kl_shampoo(LR, max_size=size),
        "eigenvalue_shampoo": fs.eigenvalue_shampoo(LR, max_size=size),
        "muon": fs.muon(LR, matrices=_matrices),
        "muon, bfloat16": fs.muon(LR, matrices=_matrices, dtype=bf16),
        "muon, Polar Express, bfloat16": fs.muon(
            LR, matrices=_matrices, polynomials="polar_express", dtype=bf16
        ),
    }
    return found | {f"{name}, TF32": fs.in_tf32(found[name]) for name in ROUNDED}


REFRESHING = ("soap", "kl_shampoo", "eigenvalue_shampoo")


def cells(setting: Setting) -> Iterator[Cell]:
    """Plain steps side by side, then refreshes, then graphs."""
    size = setting.pick(SIZE, 32)
    for name, run in {"plain": _plain, "refresh": _refresh, "graph": _graphs}.items():
        yield Cell(f"{MODEL}, blocks of {size}, {name}", partial(run, size, setting), 5.0)


def _matrices(params: Any) -> Any:
    return optree.tree_map(lambda p: p.ndim == 2, params)


def _plain(size: int, setting: Setting) -> Iterator[Row]:
    params, grads = tensors_of(MODEL, setting)
    ours = {name: Ours(tx, params, grads) for name, tx in chains(size).items()}
    steps: dict[str, Callable[[], Any]] = {name: o.step for name, o in ours.items()}
    steps |= _theirs(params, grads)
    fine, errors = working(steps)
    yield from errors
    seconds = min(setting.pick(4.0, 0.3), setting.left() / 3)
    for name, found in turns(fine, setting.device, seconds=seconds, least=3).items():
        held = {"state_mib": held_mib(ours[name].state)} if name in ours else {}
        row = {"of": name, "kind": "plain"} | summary(found)
        yield row | demands(steps[name], setting.device) | held


def _theirs(params: Tensors, grads: Tensors) -> dict[str, Callable[[], Any]]:
    """torch.optim's AdamW, and its Muon with it for what is no matrix."""
    leaves = [torch.nn.Parameter(p.clone()) for p in params.values()]
    for p, g in zip(leaves, grads.values()):
        p.grad = g
    adamw = torch.optim.AdamW(leaves, LR, fused=True)
    found = {"torch.optim.AdamW, fused": adamw.step}
    if hasattr(torch.optim, "Muon"):
        muon = torch.optim.Muon([p for p in leaves if p.ndim == 2], LR)
        rest = torch.optim.AdamW([p for p in leaves if p.ndim != 2], LR, fused=True)
        found["torch.optim.Muon and AdamW"] = lambda: (muon.step(), rest.step())
    return found


def _refresh(size: int, setting: Setting) -> Iterator[Row]:
    params, grads = tensors_of(MODEL, setting)
    for name in REFRESHING:
        tx = chains(size)[name]
        try:
            row = refreshed(Ours(tx, params, grads), tx, setting, share=0.2)
        except Exception as error:
            row = {"error": in_a_line(error)}
        yield {"of": name, "kind": "refresh"} | row


def _graphs(size: int, setting: Setting) -> Iterator[Row]:
    """The same beside what `cuda_graphed` replays, plain and with a refresh."""
    for model in setting.pick(GRAPHED_MODELS, (MODEL,)):
        params, grads = tensors_of(model, setting)
        for name in GRAPHED:
            tx = chains(size)[name]
            try:
                yield from _replayed(f"{model}, {name}", tx, params, grads, setting)
            except Exception as error:
                yield {"of": f"{model}, {name}", "error": in_a_line(error)}


def _replayed(
    name: str, tx: fs.GradientTransformation, params: Tensors, grads: Tensors, setting: Setting
) -> Iterator[Row]:
    ours = {
        f"{name}, replayed": Ours(fs.cuda_graphed(tx), params, grads),
        f"{name}, eager": Ours(tx, params, grads),
    }
    for kind in ("plain", "refresh") if tx.phase(1) else ("plain",):
        steps: dict[str, Callable[[], Any]] = {
            of: o.step if kind == "plain" else partial(o.refresh, o.tx) for of, o in ours.items()
        }
        seconds = setting.pick(0.8 if kind == "plain" else 1.2, 0.1)
        for of, found in turns(steps, setting.device, seconds=seconds, least=3).items():
            row = {"of": of, "kind": kind} | summary(found)
            if setting.device.type == "cuda":
                row["reserved_mib"] = torch.cuda.memory_reserved() / 2**20
            yield row
