"""What several ranks can't do is an error that says what to do instead, on every rank."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.func import grad, vmap

import funshampoo as fs
from funshampoo.distributed.collectives import gathered_objects
from tests.distributed.problems import SMALL, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.releases import MESSAGE, wrong_before
from tests.trees import assert_equal


def message_of(act: Callable[[], Any]) -> tuple[str, str]:
    """(type, message) of what it raised."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_without_numpy_it_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error says as little as this, at the first disagreement or load."""

    def gather(*_: Any, **__: Any) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match="need numpy.*pip install numpy"):
        gathered_objects(1, None)


def one_step(tx: fs.GradientTransformation, params: Any) -> Any:
    return tx.update(tree(1, SMALL), tx.init(params), params)


def alive(rank: int) -> bool:
    """Whether the ranks can still talk."""
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    return total.item() == dist.get_world_size()


def in_transforms(rank: int) -> Any:
    tx, params = optimizer({}), tree(0, SMALL)
    state, first = tx.init(params), tree(1, SMALL)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        g = {name: scale * x for name, x in first.items()}
        updates, _ = tx.update(g, state, params)
        return sum(u.sum() for u in updates.values())

    found = [
        message_of(lambda: grad(loss)(torch.tensor(1.0))),
        message_of(lambda: vmap(loss)(torch.ones(3))),
        message_of(lambda: torch.func.jvp(loss, (torch.tensor(1.0),), (torch.tensor(1.0),))),
    ]
    return found, alive(rank)


def test_inside_vmap_and_grad(ranks: Ranks) -> None:
    for found, still_alive in ranks(2, in_transforms):
        for kind, message in found:
            assert kind == "RuntimeError"
            assert "call update outside of the transform" in message
        assert still_alive


def members_of_an_ensemble() -> None:
    """On one rank, a sharded chain is what runs inside it."""
    tx, alone = optimizer({}, grafting="sgd"), optimizer(grafting="sgd")
    params = tree(0, SMALL)
    both = {name: torch.stack([x, 2 * x]) for name, x in params.items()}
    g = {name: torch.stack([x, 3 * x]) for name, x in tree(1, SMALL).items()}
    updates, _ = vmap(tx.update)(g, vmap(tx.init)(both), both)
    expected, _ = vmap(alone.update)(g, vmap(alone.init)(both), both)
    assert_equal(updates, expected)
    first = tree(1, SMALL)

    def loss(tx: fs.GradientTransformation, scale: torch.Tensor) -> torch.Tensor:
        given = {name: scale * x for name, x in first.items()}
        return tx.update(given, tx.init(params), params)[0]["w"].square().sum()

    one = torch.tensor(1.0)
    by_scale = [grad(functools.partial(loss, each))(one) for each in (tx, alone)]
    assert by_scale[0] > 1e-3
    torch.testing.assert_close(by_scale[0], by_scale[1])


def on_one_rank(rank: int) -> None:
    members_of_an_ensemble()


def test_on_one_rank_vmap_and_grad_work(ranks: Ranks) -> None:
    members_of_an_ensemble()  # without torch.distributed
    ranks(1, on_one_rank)  # and with it


def compiled(rank: int) -> Any:
    tx, params = optimizer({}), tree(0, SMALL)
    state = tx.init(params)

    def step(g: Any, state: Any) -> Any:
        return tx.update(g, state, params, refresh=True)

    whole = torch.compile(step, backend="eager", fullgraph=True)
    return message_of(lambda: whole(tree(1, SMALL), state)), alive(rank)


@pytest.mark.slow
def test_inside_torch_compile(ranks: Ranks) -> None:
    wrong_before("2.9", MESSAGE)
    for (_, message), still_alive in ranks(2, compiled):
        assert "Compile the loss and its gradient, and call update outside" in message
        assert still_alive


def differentiable(rank: int) -> Any:
    tx, params = optimizer({}), tree(0, SMALL)
    requiring = {name: x.clone().requires_grad_() for name, x in params.items()}

    def by_gradients() -> None:
        g = {name: x.requires_grad_() for name, x in tree(1, SMALL).items()}
        tx.update(g, tx.init(params), params)

    def on_one_rank() -> None:
        one_step(tx, requiring if rank == 0 else params)

    found = [
        message_of(by_gradients),
        message_of(lambda: one_step(tx, requiring)),
        message_of(on_one_rank),
    ]
    with torch.no_grad():
        one_step(tx, requiring)
    return found, alive(rank)


def test_updates_that_require_gradients(ranks: Ranks) -> None:
    for rank, (found, still_alive) in enumerate(ranks(2, differentiable)):
        for kind, message in found[:2]:
            assert kind == "RuntimeError"
            assert "Detach the gradients and the parameters" in message
        here = "Detach the gradients" if rank == 0 else "failed on rank 0 of 2"
        assert here in found[2][1]
        assert still_alive


def outside_the_group(rank: int) -> Any:
    group = dist.new_group([0, 1])
    tx = optimizer({"process_group": group})
    return message_of(lambda: one_step(tx, tree(0, SMALL))), alive(rank)


def test_a_process_outside_the_group(ranks: Ranks) -> None:
    first, second, (third, still_alive) = ranks(3, outside_the_group)
    assert first == second == (("", ""), True)
    assert third[0] == "ValueError"
    assert "no member of the group. Give each process the group that it belongs to" in third[1]
    assert still_alive


def with_anothers_state(rank: int) -> Any:
    params = tree(0, SMALL)
    single = optimizer({}, max_size=8).init(params)  # replaced below where this is rank 1
    tx = optimizer({}, max_size=8)
    states: list[Any] = [None, None]
    dist.all_gather_object(states, single)
    since = time.monotonic()
    found = message_of(lambda: tx.update(tree(1, SMALL), states[0], params))
    return found, time.monotonic() - since, alive(rank)


def test_a_state_of_another_rank_is_refused_and_nobody_waits(ranks: Ranks) -> None:
    """Both are given rank 0's, so rank 0 has nothing to object to but hears of it at once."""
    (first, second) = ranks(2, with_anothers_state)
    assert "failed on rank 1 of 2" in first[0][1]
    assert second[0][0] == "ValueError"
    assert "funshampoo.state.load_state_dict(tx.init(params), saved)" in second[0][1]
    for _, seconds, still_alive in (first, second):
        assert seconds < 5
        assert still_alive


def with_a_single_state(rank: int) -> Any:
    params = tree(0, SMALL)
    group = dist.new_group([rank], use_local_synchronization=True)
    state = optimizer({"process_group": group}).init(params)
    found = message_of(lambda: optimizer({}).update(tree(1, SMALL), state, params))
    return found, alive(rank)


def test_a_state_of_one_rank_is_refused_on_two(ranks: Ranks) -> None:
    for (kind, message), still_alive in ranks(2, with_a_single_state):
        assert kind == "ValueError"
        assert "holds other blocks than this rank owns" in message
        assert still_alive


def disagreeing(rank: int) -> Any:
    """The same shapes in another order: other blocks of as many elements."""
    shapes = [("a", (4, 6)), ("b", (6, 4)), ("c", (4, 6)), ("d", (6, 4))]
    params = dict(shapes if rank == 0 else [("a", (6, 4)), ("b", (4, 6)), *shapes[2:]])
    tx = optimizer({})
    zeros = tree(0, params)
    state = tx.init(zeros)
    return message_of(lambda: tx.update(tree(1, params), state, zeros)), alive(rank)


def test_ranks_with_other_parameters_are_told(ranks: Ranks) -> None:
    for (kind, message), still_alive in ranks(2, disagreeing):
        assert kind == "RuntimeError"
        assert "Give all of them the same parameters in the same order" in message
        assert still_alive


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="every is 0"):
        fs.sharded(fs.ema(0.9), every=0)
    with pytest.raises(ValueError, match="max_failures is 0"):
        fs.sharded(fs.ema(0.9), max_failures=0)
    with pytest.raises(ValueError, match=r"communication_dtype is torch\.int8"):
        fs.sharded(fs.ema(0.9), communication_dtype=torch.int8)
    tx = fs.sharded(fs.ema(0.9))
    state = tx.init({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="'w' is None and its shape unknown: pass params"):
        tx.update({"w": None}, state)


def test_without_torch_distributed_it_just_runs() -> None:
    tx, alone, params = optimizer({}), optimizer(), tree(0, SMALL)

    def gradient(t: int) -> Any:
        return tree(t, SMALL)

    steps = range(1, 6)
    assert_equal(train(tx, params, steps, gradient)[0], train(alone, params, steps, gradient)[0])
