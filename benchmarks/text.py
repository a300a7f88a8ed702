"""The data of the examples' text task, for machines without scikit-learn, which that module loads.

Python's own documentation, of which every Python carries a copy: nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CONTEXT = 64
TESTS = 100  # windows


class Text(NamedTuple):
    """Characters as codes, and the next one for each.

    Attributes:
        train: (windows, CONTEXT + 1).
        test: the same, of other windows.
        vocabulary: how many characters there are.
    """

    train: Tensor
    test: Tensor
    vocabulary: int

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets without end, drawn at random, the same for everybody."""
        make = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.train), (size,), generator=make)
            yield pair(self.train[rows.to(self.train.device)])


def pair(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The characters, and those that follow them."""
    return windows[:, :-1], windows[:, 1:]


def text(device: torch.device) -> Text:
    """All of it, on a device."""
    topics = importlib.import_module("pydoc_data.topics").topics
    characters = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: code for code, character in enumerate(sorted(set(characters)))}
    codes = torch.tensor([alphabet[character] for character in characters])
    windows = codes.unfold(0, CONTEXT + 1, CONTEXT)  # they share one character with the next
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    windows = windows.contiguous().to(device)
    return Text(windows[TESTS:], windows[:TESTS], len(alphabet))
