"""The two tasks: what is predicted from what, by which network, and when it counts as learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pydoc_data.topics import topics
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import networks
from funshampoo import Schedule
from funshampoo.schedules import constant, warmup_cosine


class Examples(NamedTuple):
    """Inputs and the classes to predict from them, one example a row."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """Data, network, and how long and how often it is trained.

    Args:
        measure: what the optimizers are compared by, on the test examples.
        goal: the accuracy, or loss, at which the task counts as learnt.
        schedule: the learning rate over a run, from its largest value and the number of steps.
        rates: learning rates, the same for every optimizer: wide enough that none is best at the
            first or the last.
        seeds: how many; each fixes the initial parameters and the order of the batches.
    """

    name: str
    train: Examples
    test: Examples
    build_network: Callable[[], nn.Module]
    measure: Literal["accuracy", "loss"]
    goal: float
    schedule: Callable[[float, int], Schedule]
    batch_size: int
    steps: int
    evaluate_every: int
    rates: tuple[float, ...]
    seeds: int

    def to(self, device: str) -> Task:
        """The task with its data on another device."""
        train, test = (Examples(*(x.to(device) for x in part)) for part in (self.train, self.test))
        return replace(self, train=train, test=test)


def digits() -> Task:
    """Handwritten digits of 8×8 pixels (UCI, as scikit-learn ships them): 500 of 1,797 for test."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    train, test = split(Examples(pixels, torch.tensor(data.target)), tests=500)
    return Task(
        name="digits",
        train=train,
        test=test,
        build_network=networks.ConvNet,
        measure="accuracy",
        goal=0.97,
        schedule=lambda rate, steps: constant(rate),
        batch_size=64,
        steps=150,
        evaluate_every=5,
        rates=(0.003, 0.01, 0.03, 0.1, 0.3),
        seeds=5,
    )


def text(context: int = 64) -> Task:
    """The next character of Python's own documentation, of which every Python carries a copy."""
    characters = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: code for code, character in enumerate(sorted(set(characters)))}
    codes = torch.tensor([alphabet[character] for character in characters])
    windows = codes.unfold(0, context + 1, context)  # they share one character with the next
    train, test = split(Examples(windows[:, :-1], windows[:, 1:]), tests=100)
    return Task(
        name="text",
        train=train,
        test=test,
        build_network=lambda: networks.Transformer(len(alphabet), context),
        measure="loss",
        goal=2.5,
        schedule=lambda rate, steps: warmup_cosine(rate, steps // 10 + 1, steps + 1),
        batch_size=16,
        steps=200,
        evaluate_every=10,
        rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        seeds=1,
    )


def split(examples: Examples, tests: int) -> tuple[Examples, Examples]:
    """Examples to train on and examples to test on, drawn once and for all."""
    order = torch.randperm(len(examples.inputs), generator=torch.Generator().manual_seed(0))
    chosen, rest = order[:tests], order[tests:]
    inputs, targets = examples
    return Examples(inputs[rest], targets[rest]), Examples(inputs[chosen], targets[chosen])


TASKS = {"digits": digits, "text": text}
