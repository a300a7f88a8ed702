"""Faults put into one rank of three: an error that names it on every rank, or nothing is lost."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import funshampoo as fs
from funshampoo.state import state_dict
from tests.distributed.problems import SMALL, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

GUILTY = 1
OPTIONS: dict[str, Any] = {"max_size": 8, "every": 3, "momentum": 0.9}


class BombError(Exception):
    """Nothing that anybody expects."""


RAISED: dict[str, type[BaseException]] = {
    "an error": BombError,
    "no memory": MemoryError,
    "ctrl-c": KeyboardInterrupt,
    "exit": SystemExit,
}


def bomb(kind: type[BaseException], rank: int, at: int) -> fs.GradientTransformation:
    def update(updates: Any, state: Any, *, step: Any) -> Any:
        if step == at and rank == GUILTY:
            raise kind("here")
        return updates, state

    return fs.GradientTransformation(lambda params: fs.EmptyState(), update)


def raising(rank: int, what: str, at: int, donate: bool) -> Any:
    def distribute(inner: Any, **options: Any) -> fs.GradientTransformation:
        return fs.sharded(fs.chain(inner, bomb(RAISED[what], rank, at)), **options)

    tx, params = fs.shampoo(0.1, distribute=distribute, **OPTIONS), tree(0, SMALL)
    state, since, t, caught = tx.init(params), time.monotonic(), 0, ""
    try:
        for t in range(1, 6):
            updates, state = tx.update(tree(t, SMALL), state, params, donate=donate)
            params = fs.apply_updates(params, updates)
    except BaseException as error:
        caught = f"{type(error).__name__}: {error}"
    total = torch.tensor(1.0)
    dist.all_reduce(total)  # and all can go on
    return t, caught, params, total.item(), time.monotonic() - since


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("donate", [False, True])
def test_whatever_is_raised_on_one_rank_reaches_all_at_once(
    ranks: Ranks, what: str, at: int, donate: bool
) -> None:
    found = ranks(3, raising, what, at, donate)
    happened = "failed" if issubclass(RAISED[what], Exception) else "was interrupted"
    for rank, (t, caught, params, total, seconds) in enumerate(found):
        assert t == at
        if rank == GUILTY:
            assert caught == f"{RAISED[what].__name__}: here"
        else:
            assert f"the optimizer step {happened} on rank 1 of 3" in caught
        assert_equal(params, found[0][2])
        assert total == 3.0
        assert seconds < 10


# Updates that do not fit into the dtype of the way.

SIDE = 4
BLOCKS = {"w": (2 * SIDE, SIDE), "b": (SIDE,), "s": ()}
SCALE = 2.0**20  # an entry of 1 becomes too large for float16
HELD = {
    "large": torch.full((SIDE, SIDE), 1.0),
    "one entry": torch.zeros(SIDE, SIDE).index_fill_(0, torch.tensor(1), -0.25),
    "nan": torch.full((SIDE, SIDE), float("nan")),
}


def narrow(rank: int, bad: str, dtype: torch.dtype, cut: bool, guard: bool, donate: bool) -> Any:
    """The block (1, 0) of w, or the whole of it, can't be sent in steps 2 and 3 of 5."""
    stage = fs.chain(fs.trace(0.0), fs.scale(SCALE if dtype == torch.float16 else 2.0**127))
    inner = fs.guarded(stage, max_failures=None, by_leaf=not cut) if guard else stage
    tx = fs.sharded(inner, communication_dtype=dtype, every=1, max_failures=None)
    tx = fs.blocked(tx, SIDE) if cut else tx
    params = {name: torch.zeros(shape) for name, shape in BLOCKS.items()}
    state, moved, reports = tx.init(params), [], []
    small = 2.0**-20 if dtype == torch.float16 else 2.0**-127
    for t in range(1, 6):
        g = {name: torch.full(shape, small) for name, shape in BLOCKS.items()}
        if t in (2, 3):
            g["w"][SIDE:] = HELD[bad] * (1.0 if dtype == torch.float16 else 8.0)
        kept = {name: x.clone() for name, x in state_dict(state).items()}
        updates, new = tx.update(g, state, params, donate=donate)
        if not donate:  # a pure update writes to nothing
            assert_equal(dict(state_dict(state)), kept)
        state, params = new, fs.apply_updates(params, updates)
        moved.append({name: float(u.sum()) for name, u in updates.items()})
        found = fs.state.find_state(state, fs.state.ShardedState)
        assert found is not None
        reports.append([int(x) for x in found.report])
    held = {k: int(x) for k, x in state_dict(state).items() if k.endswith("/held") and x.any()}
    return params, moved, reports, held


@pytest.mark.parametrize("bad", HELD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", [True, False], ids=["blocks", "leaves"])
@pytest.mark.parametrize("donate", [False, True])
def test_an_update_that_does_not_fit_is_held_and_counted(
    ranks: Ranks, bad: str, dtype: torch.dtype, cut: bool, donate: bool
) -> None:
    found = ranks(2, narrow, bad, dtype, cut, True, donate)
    rows = 2 * SIDE * SIDE if not cut else SIDE * SIDE
    for params, moved, reports, _ in found:
        assert all(torch.isfinite(x).all() for x in params.values())
        assert [m["b"] for m in moved] == [SIDE] * 5  # others go on
        assert [m["s"] for m in moved] == [1.0] * 5
        whole = 2.0 * SIDE * SIDE
        left = whole - rows
        assert [m["w"] for m in moved] == [whole, left, left, whole, whole]
        assert reports == [[0] * 4, [1, 1, 0, 0], [2, 2, 0, 0], [2, 0, 0, 0], [2, 0, 0, 0]]
    counts = [n for _, _, _, held in found for n in held.values()]
    assert counts == [2]  # on its owner alone


def test_without_a_guard_it_is_held_all_the_same(ranks: Ranks) -> None:
    for params, moved, reports, held in ranks(2, narrow, "large", torch.float16, True, False, True):
        assert all(torch.isfinite(x).all() for x in params.values())
        assert moved[1]["w"] == SIDE * SIDE
        assert not held
        assert reports[-1] == [0] * 4


def too_often(rank: int) -> str:
    distribute = functools.partial(fs.sharded, communication_dtype=torch.float16)
    tx = fs.shampoo(1e6, distribute=distribute, **(OPTIONS | {"max_failures": 2, "every": 1}))
    params = tree(0, SMALL)
    state = tx.init(params)
    try:
        for t in range(1, 6):
            updates, state = tx.update(tree(t, SMALL), state, params)
            assert all(not u.any() for u in updates.values())
    except fs.FailureLimitError as error:
        return f"{t}: {error}"
    return ""


def test_too_many_in_a_row_stop_all_ranks(ranks: Ranks) -> None:
    first, second = ranks(2, too_often)
    assert first == second
    assert first.startswith("3: ")
    assert "w block_0_0" in first
