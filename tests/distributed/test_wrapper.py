"""Training loops on several ranks: DistributedDataParallel with the wrapper, and torch.func."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel

import funshampoo as fs
from funshampoo import linalg
from funshampoo.state import merged
from tests.distributed.problems import Shapes, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_close, assert_equal

OPTIONS: dict[str, Any] = {"max_size": 8, "every": 3, "momentum": 0.9, "weight_decay": 0.01}
BATCH = 16


class Network(nn.Module):
    """With a frozen parameter, one that no loss depends on, and one that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 12)
        self.second = nn.Linear(12, 3)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.sometimes = nn.Linear(12, 12)
        self.double()  # roots of young statistics make much of a gradient's last float32 bits

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        x = self.first(x).tanh()
        x = x + self.frozen(x)
        if deep:
            x = x + self.sometimes(x).tanh()
        return self.second(x)


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(BATCH, 10, generator=generator, dtype=torch.float64)
    return x, x[:, :3].square()


def my_part(t: int) -> tuple[Tensor, Tensor]:
    x, y = batch(t)
    if not dist.is_initialized():
        return x, y
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


def step(model: nn.Module, optimizer: fs.Optimizer, t: int) -> None:
    x, y = my_part(t)
    optimizer.zero_grad()
    (model(x, deep=t % 2 == 0) - y).square().mean().backward()
    before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, known in zip(model.parameters(), before):
        if known is None:
            assert p.grad is None
        else:
            assert p.grad is known[0]
            assert torch.equal(p.grad, known[1])


def with_ddp(rank: int, steps: range, saved: Any) -> Any:
    network = Network()
    several = dist.is_initialized() and dist.get_world_size() > 1
    options = OPTIONS | ({"distribute": fs.sharded} if several else {})
    # As a loop would have it before it wraps the model: the optimizer takes the parameters.
    model: nn.Module = network
    if several:
        model = DistributedDataParallel(
            network, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    optimizer = fs.Shampoo(model.parameters(), lr=0.05, **options)
    if saved is not None:
        network.load_state_dict(saved[0])
        optimizer.load_state_dict(merged(saved[1]))
    for t in steps:
        step(model, optimizer, t)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return network.state_dict(), torch.load(file, weights_only=True)


def test_the_wrapper_with_ddp(ranks: Ranks) -> None:
    """Equal on both ranks, and as one process with the joint batch; checkpoints go on there."""
    expected, _ = with_ddp(0, range(1, 13), None)
    initial = Network().state_dict()
    first, second = ranks(2, with_ddp, range(1, 13), None)
    assert_equal(first[0], second[0])
    assert_close(first[0], expected, 1e-5)
    for name, x in expected.items():
        still = name.startswith(("frozen", "unused"))
        assert torch.equal(x, initial[name]) == still
        assert torch.equal(first[0][name], initial[name]) == still
    halfway = ranks(2, with_ddp, range(1, 7), None)
    saved = halfway[0][0], [part for _, part in halfway]
    for size in (1, 2):
        for got, _ in ranks(size, with_ddp, range(7, 13), saved):
            assert_close(got, first[0], 1e-5 if size == 1 else 0.0)


def functional(rank: int) -> Any:
    network = Network()
    params = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    size = dist.get_world_size() if dist.is_initialized() else 1
    tx = fs.shampoo(0.05, distribute=fs.sharded if size > 1 else None, **OPTIONS)
    state = tx.init(params)

    def loss(params: Any, x: Tensor, y: Tensor, deep: bool) -> Tensor:
        return (functional_call(network, params, (x, deep)) - y).square().mean()

    for t in range(1, 13):
        gradients = grad(loss)(params, *my_part(t), t % 2 == 0)
        if size > 1:
            for g in gradients.values():
                dist.all_reduce(g)
                g /= size
        updates, state = tx.update(gradients, state, params)
        params = fs.apply_updates(params, updates)
    return params


def test_a_functional_loop(ranks: Ranks) -> None:
    expected = functional(0)
    first, second = ranks(2, functional)
    assert_equal(first, second)
    assert_close(first, expected, 1e-5)


def without_gradients(rank: int) -> Any:
    """No rank has a gradient at all, and one rank owns every block."""
    p = nn.Parameter(tree(0, {"w": (9, 9)})["w"])
    optimizer = fs.Shampoo([p], lr=0.1, distribute=fs.sharded)
    optimizer.step()
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    return p.detach(), total.item()


def test_a_step_without_any_gradient(ranks: Ranks) -> None:
    for got, total in ranks(2, without_gradients):
        assert torch.equal(got, tree(0, {"w": (9, 9)})["w"])
        assert total == 2.0


# Staggered refreshes.

MANY: Shapes = {"w": (32, 48), "v": (40, 8)}


def roots_per_step(rank: int, stagger: bool) -> list[int]:
    """How many matrices the solver is given on every step."""
    solved = 0
    solve = linalg.eigh(relative_epsilon=1e-6)

    def counted(A: Tensor, p: float, epsilon: Any = 0.0) -> linalg.InverseRoot:
        nonlocal solved
        solved += math.prod(A.shape[:-2])
        return solve(A, p, epsilon)

    options = {"every": 5, "max_size": 8, "stagger": stagger, "solver": counted}
    several = dist.is_initialized()
    tx = fs.shampoo(0.01, distribute=fs.sharded if several else None, **options)
    params = tree(0, MANY)
    state, counts = tx.init(params), []
    for t in range(1, 16):
        solved = 0
        _, state = tx.update(tree(t, MANY), state, params)
        counts.append(solved)
    return counts


def test_staggered_refreshes_are_even_on_every_rank(ranks: Ranks) -> None:
    """No step after the first carries them all; together each block has its turn once."""
    blocks = 24 + 5
    for size in (1, 2, 3):
        found = ranks(size, roots_per_step, True)
        together = [sum(step) for step in zip(*found)]
        assert together[0] == 2 * blocks
        for first in range(1, 11):
            assert sum(together[first : first + 5]) == 2 * blocks
        for counts in found:
            owned = counts[0] // 2
            assert max(counts[1:]) <= 2 * (math.ceil(owned / 5) + 2)
            assert min(counts[1:]) > 0
    unstaggered = [sum(step) for step in zip(*ranks(2, roots_per_step, False))]
    assert unstaggered == [2 * blocks * (t in {1, 5, 10, 15}) for t in range(1, 16)]
