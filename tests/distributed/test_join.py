"""Uneven inputs: a rank whose data ends first goes on stepping, by torch's own `Join`."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import funshampoo as fs
from funshampoo.core.tree import map_leaves
from funshampoo.distributed.join import group_of
from tests.distributed.ranks import Ranks
from tests.trees import assert_close, assert_equal

STEPS = (3, 6, 4)  # of each rank


class Network(nn.Module):
    """With a layer that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def batch(rank: int, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + t)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64)


def loss(model: Any, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


OPTIONS: dict[str, Any] = {"lr": 0.05, "max_size": 4, "every": 2, "momentum": 0.9}


def uneven(rank: int, shard: bool, as_tensor: bool = False) -> Any:
    """Everybody's scheduler halves its rate on each step of its own."""
    model = Network()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    options = OPTIONS | ({"distribute": fs.sharded} if shard else {})
    if as_tensor:
        options |= {"lr": torch.tensor(0.05, dtype=torch.float64), "betas": [0.9, 0.99]}
    optimizer = fs.Shampoo(ddp.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    joinables: list[Any] = [ddp, optimizer]
    with Join(joinables):
        for t in range(STEPS[rank]):
            optimizer.zero_grad()
            loss(ddp, batch(rank, t)).backward()
            optimizer.step()
            scheduler.step()
    assert optimizer._join_config is None
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.zero_grad()
    loss(ddp, batch(0, 99)).backward()
    optimizer.step()  # an ordinary one, after it
    return {name: p.detach() for name, p in model.named_parameters()}


def one_process() -> Any:
    """What each step should see: the mean over the ranks that still have data."""
    model = Network()
    optimizer = fs.Shampoo(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(max(STEPS)):
        optimizer.zero_grad()
        live = [rank for rank, steps in enumerate(STEPS) if t < steps]
        for rank in live:  # DistributedDataParallel divides by all ranks until it is told otherwise
            (loss(model, batch(rank, t)) / len(STEPS)).backward()
        optimizer.step()
        scheduler.step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    loss(model, batch(0, 99)).backward()
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("shard", "as_tensor"), [(True, False), (False, False), (True, True)])
def test_uneven_inputs_are_those_of_one_process(ranks: Ranks, shard: bool, as_tensor: bool) -> None:
    """Whatever the numbers of a group are: floats, tensors, lists."""
    expected = one_process()
    found = ranks(3, uneven, shard, as_tensor)
    for got in found:
        assert_equal(got, found[0])
        assert_close(got, expected, 1e-9)


def optimizer_first(rank: int) -> str:
    ddp = DistributedDataParallel(Network(), find_unused_parameters=True)
    optimizer = fs.Shampoo(ddp.parameters(), **OPTIONS, distribute=fs.sharded)
    joinables: list[Any] = [optimizer, ddp]
    try:
        with Join(joinables):
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_the_model_comes_first(ranks: Ranks) -> None:
    for message in ranks(2, optimizer_first):
        assert "Give the model first" in message


def scaled_by_value(learning_rate: float = 0.1, default: bool = True) -> fs.GradientTransformation:
    """A recipe with a stage that takes a value of the caller's, or has one of its own."""

    def scaled(updates: Any, value: float) -> Any:
        return map_leaves(lambda u: None if u is None else u * value, updates)

    def defaulting(updates: Any, state: Any, *, value: float = 1.0) -> Any:
        return scaled(updates, value), state

    def wanting(updates: Any, state: Any, *, value: float) -> Any:
        return scaled(updates, value), state

    stage = fs.GradientTransformation(lambda params: (), defaulting if default else wanting)
    return fs.sharded(fs.chain(stage, fs.scale_by_learning_rate(learning_rate)))


def with_a_value(rank: int, default: bool, enable: bool) -> tuple[str, bool]:
    """Uneven steps, and whether one has moved anything."""
    ddp = DistributedDataParallel(Network(), find_unused_parameters=True)
    optimizer = fs.Optimizer(ddp.parameters(), scaled_by_value, lr=0.1, default=default)
    joinables: list[Any] = [ddp, optimizer]
    message = ""
    try:
        with Join(joinables, enable=enable):
            for t in range(1 + rank * enable):
                loss(ddp, batch(rank, t)).backward()
                optimizer.step(value=3.0)
    except RuntimeError as error:
        message = str(error)
    return message, not torch.equal(ddp.module.first.weight, Network().first.weight)


@pytest.mark.parametrize("default", [True, False])
def test_values_of_a_step_are_refused_where_ranks_may_join(ranks: Ranks, default: bool) -> None:
    """A rank without data has none: it stepped with the stage's default, or with an error."""
    for message, moved in ranks(2, with_a_value, default, True):
        assert "steps without value=..." in message
        assert not moved
    assert ranks(2, with_a_value, default, False) == [("", True)] * 2


def without_the_optimizer(rank: int) -> Any:
    """Only the model is joined: the last rank waits in vain, and hears what it may be."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=3))
    ddp = DistributedDataParallel(Network(), process_group=group, find_unused_parameters=True)
    optimizer = fs.Shampoo(ddp.parameters(), **OPTIONS, distribute=_in(group))
    since = time.monotonic()
    try:
        with ddp.join():
            for t in range(3 + rank):
                optimizer.zero_grad()
                loss(ddp, batch(rank, t)).backward()
                optimizer.step()
    except RuntimeError as error:
        return str(error), time.monotonic() - since
    return "", 0.0


def _in(group: Any) -> Any:
    def distribute(inner: Any, **options: Any) -> fs.GradientTransformation:
        return fs.sharded(inner, group, **options)

    return distribute


def test_a_rank_that_waits_in_vain_is_told_of_uneven_inputs(ranks: Ranks) -> None:
    (_, (message, seconds)) = ranks(2, without_the_optimizer)
    assert "Join([model, optimizer])" in message
    assert seconds < 20


def groups(rank: int) -> Any:
    group = dist.new_group([0, 1])
    tx = fs.shampoo(0.1, distribute=_in(group))
    return group_of([fs.sgd(0.1), tx]) is group, group_of([fs.shampoo(0.1, distribute=fs.sharded)])


def test_the_group_is_that_of_the_chain(ranks: Ranks) -> None:
    assert ranks(2, groups) == [(True, None)] * 2
