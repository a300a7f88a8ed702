"""What the faster options do to training: loss curves on the digits task, over seeds."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

import funshampoo as fs
from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.works import Batch
from examples.networks import ConvNet

PLAIN = "plain"
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "products in bfloat16": {"product_dtype": torch.bfloat16},
    "refreshes staggered": {"stagger": True},
    "old bases while they are good": {"basis_tolerance": 0.1},
    "packed": {"packed": True},
}
RATE = 0.03  # Shampoo's best in examples/train.py
BATCH = 64
TESTS = 500
AT = (25, 50, 100, 150)  # steps

ABOUT = f"""The digits task of examples/train.py (a convolutional network on handwritten digits of
8×8 pixels; {TESTS} of 1,797 for test), learning rate {RATE}, the recipe's other defaults. A seed
fixes the initial parameters and the order of the batches, which are the same for all options. Test
loss after so many steps: median over the seeds [least, most]. Within: the option's median lies in
the spread of the plain path's seeds, at every one of these steps."""


def section(settings: Settings) -> Section:
    """One cell: an option is judged by the plain path beside it."""
    columns = [
        Column("option", "option"),
        *[Column(f"loss_{t}", f"loss at {t}") for t in AT],
        Column("within", "within the seed spread"),
        Column("seeds", "seeds", "number"),
    ]

    def run() -> Rows:
        seeds = 2 if settings.quick else 10
        names = list(itertools.islice(OPTIONS, 2)) if settings.quick else list(OPTIONS)
        losses = {
            name: [train(seed, OPTIONS[name], settings.device) for seed in range(seeds)]
            for name in names
        }
        return [_row(name, losses[name], losses[PLAIN]) for name in names]

    return Section("curves", "Training with the options", ABOUT, columns, [Cell("digits", run)])


def _row(name: str, mine: list[dict[int, float]], plain: list[dict[int, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"option": name, "seeds": len(mine), "curves": mine}
    within = True
    for t in AT:
        own, usual = [c[t] for c in mine], [c[t] for c in plain]
        within &= min(usual) <= median(own) <= max(usual)
        row[f"loss_{t}"] = f"{median(own):.3f} [{min(own):.3f}, {max(own):.3f}]"
    return row | {"within": "yes" if within else "NO"}


def train(seed: int, options: dict[str, Any], device: torch.device) -> dict[int, float]:
    """{step: test loss}, every 5 steps."""
    inputs, targets = digits(device)
    torch.manual_seed(seed)
    network = ConvNet().to(device)
    params = {name: p.detach() for name, p in network.named_parameters()}

    def loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return cross_entropy(functional_call(network, params, batch[0]), batch[1])

    gradient: Callable[..., dict[str, Tensor]] = grad(loss)
    tx = fs.shampoo(RATE, **options)
    state = tx.init(params)
    found = {}
    batches = shuffled(inputs[TESTS:], targets[TESTS:], seed)
    for t, batch in zip(range(1, max(AT) + 1), batches):
        state = fs.update_in_place(tx, gradient(params, batch), state, params)
        if t % 5 == 0:
            found[t] = loss(params, (inputs[:TESTS], targets[:TESTS])).item()
    return found


def digits(device: torch.device) -> Batch:
    """Images (1797, 1, 8, 8) and classes, in an order of their own, from scikit-learn."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return images.to(device), torch.tensor(data.target)[order].to(device)


def shuffled(inputs: Tensor, targets: Tensor, seed: int) -> Iterator[Batch]:
    """Batches without end; every pass over the examples is in a new order."""
    make = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=make)
        for rows in order.split(BATCH):
            if len(rows) == BATCH:
                yield inputs[rows], targets[rows]
