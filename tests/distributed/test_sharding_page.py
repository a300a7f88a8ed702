"""The code of docs/sharding.md runs, on four ranks, and trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funshampoo as fs
from tests.distributed.ranks import Ranks
from tests.distributed.test_fsdp import full
from tests.test_docs import python_blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 5)
        self.init_weights()

    def init_weights(self) -> None:
        if not self.head.weight.is_meta:
            for i, p in enumerate(self.parameters()):
                generator = torch.Generator().manual_seed(i)
                values = torch.randn(p.shape, generator=generator) / 3
                with torch.no_grad():
                    p.copy_(fs.core.wholes.placed_as(p.detach(), values))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def as_in_one_process(model: nn.Module, optimizer: Any, alone: Any) -> bool:
    """Three steps of both, on the gradients of the sharded one."""
    plain = Blocks()
    other = alone(plain)
    for step in range(3):
        model(batch(step)).square().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters()):
            p.grad = full(q.grad)
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    same = [torch.equal(full(q), p) for p, q in zip(plain.parameters(), model.parameters())]
    return all(same) and not torch.equal(plain.head.weight, Blocks().head.weight)


def the_page(rank: int, folder: str) -> dict[str, bool]:
    names: dict[str, Any] = {"__name__": "page"}
    for block in python_blocks("docs/sharding.md"):
        exec(block, names)
    found, shampoo = {}, {"lr": 0.01, "weight_decay": 0.1}
    alone: dict[str, Any] = {
        "fsdp2": ((4,), lambda m: fs.Shampoo(m.named_parameters(), **shampoo)),
        "hsdp": ((2, 2), lambda m: fs.for_model(m, "soap", lr=3e-3, other_lr=1e-3)),
        "tensor_parallel": ((4,), lambda m: fs.for_model(m, "muon", lr=0.02, other_lr=1e-3)),
        "both": ((2, 2), lambda m: fs.Shampoo(m.named_parameters(), lr=0.01)),
    }
    for name, (sides, other) in alone.items():
        model = Blocks()
        optimizer = names[name](model, *sides)
        found[name] = as_in_one_process(model, optimizer, other)
    start = Blocks()
    params = names["functional"](start, 4, [batch(t) for t in range(3)])
    before = dict(start.named_parameters())
    found["functional"] = not any(torch.equal(full(p), before[n]) for n, p in params.items())

    model, optimizer = names["made"](Blocks, 4)
    method = {"lr": 0.01, "other_lr": 1e-3}
    found["made"] = as_in_one_process(
        model, optimizer, lambda m: fs.for_model(m, "shampoo", **method)
    )
    names["save"](model, optimizer, folder)
    again = names["made"](Blocks, 4)
    names["load"](*again, folder)
    for network, own in ((model, optimizer), again):
        network(batch(9)).square().mean().backward()
        own.step()
    pairs = zip(model.parameters(), again[0].parameters())
    found["load"] = all(torch.equal(full(p), full(q)) for p, q in pairs)
    return found


@pytest.mark.slow
def test_the_examples_of_the_page(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(4, the_page, str(tmp_path)):
        assert found == dict.fromkeys(found, True)
        assert len(found) == 7
