"""Spectra of real factor matrices, and matrices made of them.

`python -m benchmarks.factors` trains the text task's transformer with Shampoo for some minutes and
writes the eigenvalues of a few bias-corrected factors to benchmarks/data/spectra.json. Eigenvectors
are not kept: a matrix is put together again as Q diag(λ) Qᵀ with a random orthogonal Q, and of
another side than it had by interpolation of log λ.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

import funshampoo as fs
from benchmarks.text import CONTEXT, text
from examples.networks import Transformer

PATH = Path(__file__).parent / "data" / "spectra.json"
FLOOR = 1e-12  # of the largest eigenvalue: what is below is written as this much
CPU = torch.device("cpu")

WIDTH = 256
BETA2 = 0.99
RATE = 0.01
BATCH = 16
STEPS = 300
WANTED = {
    "query, left": (300, "blocks.0.attention.query.weight", 0),
    "query, right": (300, "blocks.0.attention.query.weight", 1),
    "value of the last layer, left": (300, "blocks.1.attention.value.weight", 0),
    "perceptron, 1,024 outputs": (300, "blocks.0.perceptron.0.weight", 0),
    "perceptron of the last layer, 1,024 inputs": (300, "blocks.1.perceptron.2.weight", 1),
    "embedding, characters": (300, "embedding.weight", 0),
    "perceptron, 1,024 outputs, after 4 steps": (4, "blocks.0.perceptron.0.weight", 0),
    "position, right, after 2 steps": (2, "position", 1),
}
"""{name: (step, parameter, side)}. The last three lack rank."""


class Stack(NamedTuple):
    """Factors of one side, whose spectra take turns.

    Attributes:
        A: (N, d, d) float32, largest eigenvalue 1.
        basis: (N, d, d) float64, the eigenvectors they were made of.
        values: (N, d) float64, their eigenvalues, rising.
        names: of the spectra, one a matrix.
    """

    A: Tensor
    basis: Tensor
    values: Tensor
    names: list[str]


def spectra() -> dict[str, Tensor]:
    """{name: eigenvalues (d,) float64, rising, the largest 1}; a floor stands for no rank."""
    found: dict[str, list[float]] = json.loads(PATH.read_text())["log10"]
    return {
        name: 10 ** torch.tensor(logs, dtype=torch.float64).clamp(min=math.log10(FLOOR))
        for name, logs in found.items()
    }


def resampled(values: Tensor, side: int) -> Tensor:
    """A spectrum of another side: log λ in between, evenly spaced.

    >>> resampled(torch.tensor([0.01, 1.0]), 3)
    tensor([0.0100, 0.1000, 1.0000])
    """
    log = values.log()[None, None]
    line = torch.nn.functional.interpolate(log, side, mode="linear", align_corners=True)
    return line[0, 0].exp()


def stack(side: int, count: int, device: torch.device) -> Stack:
    """The first `count` factors; from the spectra's number on they repeat."""
    known = spectra()
    names = list(known)[:count]
    make = torch.Generator(device).manual_seed(side)
    shape = (len(names), side, side)
    noise = torch.randn(shape, generator=make, device=device, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    values = torch.stack([resampled(known[name], side) for name in names]).to(device)
    A = symmetric(basis, values).float()
    copies = math.ceil(count / len(names))
    repeat = [x.repeat(copies, *[1] * (x.ndim - 1))[:count] for x in (A, basis, values)]
    return Stack(*repeat, (names * copies)[:count])


def symmetric(basis: Tensor, values: Tensor) -> Tensor:
    """Q diag(λ) Qᵀ, equal to its transpose."""
    A = (basis * values[..., None, :]) @ basis.mT
    return (A + A.mT) / 2


def measured(steps: int = STEPS) -> dict[str, Tensor]:
    """{name: eigenvalues} of a training run, in float64: what is not there is not rounding."""
    torch.manual_seed(0)
    data = text(CPU)
    network = Transformer(data.vocabulary, CONTEXT, WIDTH).double()
    params = {name: p.detach() for name, p in network.named_parameters()}

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = functional_call(network, params, (inputs,))
        return cross_entropy(logits.flatten(0, -2), targets.flatten())

    watched = {name: params[name] for _, name, _ in WANTED.values()}
    statistics = fs.kronecker_statistics(BETA2)
    kept = statistics.init(watched)
    tx = fs.shampoo(fs.schedules.warmup_cosine(RATE, 20, STEPS), beta2=BETA2, every=50)
    state = tx.init(params)
    found = {}
    for t, batch in zip(range(1, steps + 1), data.batches(BATCH, seed=0)):
        grads = grad(loss)(params, batch)
        _, kept = statistics.update({name: grads[name] for name in watched}, kept)
        state = fs.update_in_place(tx, grads, state, params)
        for label, (step, name, side) in WANTED.items():
            if step == t:
                found[label] = torch.linalg.eigvalsh(kept.factors[name][side])
    return {label: found[label] for label in WANTED if label in found}


def written(found: dict[str, Tensor]) -> dict[str, Any]:
    """For the file: log10 of what is relative to the largest."""
    logs = {name: (x / x.max()).clamp(min=FLOOR).log10().tolist() for name, x in found.items()}
    about = f"log10(λ / λmax), rising, by {__name__}; {math.log10(FLOOR):g} stands for less."
    return {
        "about": about,
        "log10": {name: [round(x, 3) for x in line] for name, line in logs.items()},
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(written(measured())) + "\n")
