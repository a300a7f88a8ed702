"""Never poisoned, never hung: what happens on one rank alone."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import funshampoo as fs
from funshampoo.blocks.layout import Stack
from funshampoo.distributed.all_gather import AllGather
from funshampoo.distributed.disagreement import RankStatus
from funshampoo.distributed.shards import shards_of
from funshampoo.state import health, state_dict
from tests.distributed.problems import Shapes, block_state, held_here, report_of, tree
from tests.distributed.ranks import Ranks
from tests.distributed.test_parts import placed, whole
from tests.sooner import these
from tests.trees import assert_close, assert_equal, meaning, tensors

SHAPES: Shapes = {"w": (16, 16), "kernel": (6, 3, 2), "bias": (9,), "scale": ()}
OPTIONS = {"max_size": 8, "every": 3, "momentum": 0.9, "weight_decay": 0.1}
STEPS = 8


def one_entry(value: float) -> Callable[[Tensor], Tensor]:
    def put(block: Tensor) -> Tensor:
        block = block.clone()
        block[3, 2] = value
        return block

    return put


UNUSABLE = {
    "nan": one_entry(float("nan")),
    "inf": one_entry(float("inf")),
    "-inf": one_entry(-float("inf")),
    "1e30": one_entry(1e30),
}
STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "1e-30": lambda block: 1e-30 * block,
    "zero": torch.zeros_like,
    "rank_one": lambda block: torch.outer(block[0], block[1]),
}
FAULTS = UNUSABLE | STRANGE


def place_of(state: Any, owned: bool) -> tuple[int, int]:
    """The first block of w that this rank owns, or does not."""
    mine = {name.split("/")[1] for name in state_dict(state) if name.startswith("w/")}
    places = [(i, j) for i in range(2) for j in range(2)]
    return next(p for p in places if (f"block_{p[0]}_{p[1]}" in mine) == owned)


@functools.cache
def clean_run() -> list[Any]:
    """Parameters after every step without a fault, on one rank."""
    tx, params = fs.shampoo(0.1, **OPTIONS), tree(0, SHAPES)
    state, history = tx.init(params), [params]
    for t in range(1, STEPS + 1):
        updates, state = tx.update(tree(t, SHAPES), state, params)
        params = fs.apply_updates(params, updates)
        history.append(params)
    return history


def looked_at(t: int) -> int:
    """The last step after which the ranks have told one another of failures."""
    every = OPTIONS["every"]
    return max((s for s in range(1, t + 1) if (s + 1) % every == 0), default=0)


def faulty_run(rank: int, fault: str, at: int, guilty: int, in_own: bool) -> Any:
    """Rank `guilty` finds `fault` in one block of its gradient at step `at`."""
    tx, params = fs.shampoo(0.1, distribute=fs.sharded, **OPTIONS), tree(0, SHAPES)
    state = tx.init(params)
    i, j = place_of(state, owned=in_own == (rank == guilty))
    here = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
    held = in_own and fault in UNUSABLE
    reports, history = [], []
    for t in range(1, STEPS + 1):
        g = tree(t, SHAPES)
        if t == at and rank == guilty:
            g["w"][here] = FAULTS[fault](g["w"][here])
        before, block = block_state(state), params["w"][here].clone()
        updates, state = tx.update(g, state, params, donate=True)
        params = fs.apply_updates(params, updates)
        assert all(torch.isfinite(x).all() for x in tensors((params, state))), (fault, t)
        if t == at and held:
            assert torch.equal(params["w"][here], block)
            mine = [name for name in before if name.startswith(f"w/block_{i}_{j}/")]
            assert bool(mine) == (rank == guilty)
            after, before = meaning(block_state(state)), meaning(before)
            for name in set(mine) & before.keys():  # statistics, moments, momentum, roots
                assert_close(after[name], before[name], 1e-6)
        reports.append(report_of(state))
        history.append(params)
    assert health(state, file=io.StringIO()).ranks == [tuple(reports[-1])]
    assert held_here(state) == (1 if held and rank == guilty else 0)
    for t, report in enumerate(reports, start=1):
        seen = looked_at(t)
        assert report == [int(held and seen >= at), int(held and seen == at), 0, 0]
    for got, expected in zip(history, clean_run()[1:]):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[here] = True
        assert torch.equal(got["w"][~inside], expected["w"][~inside]), fault
        assert_equal({**got, "w": ()}, {**expected, "w": ()})
    # The block itself: untouched where its owner saw no fault, else it went another way.
    assert torch.equal(history[-1]["w"][here], expected["w"][here]) == (not in_own)
    return params


def every_place(rank: int, fault: str) -> Any:
    """At a refresh and between, on either rank, in a block that it owns and in another's."""
    return [
        faulty_run(rank, fault, at, guilty, in_own)
        for at in (3, 4)
        for guilty in (0, 1)
        for in_own in (True, False)
    ]


@pytest.mark.parametrize("fault", these([*FAULTS], sooner={"nan", "inf", "zero"}))
def test_a_fault_on_one_rank_stays_in_its_block(ranks: Ranks, fault: str) -> None:
    first, second = ranks(2, every_place, fault)
    assert_equal(first, second)


# Solvers and stages that fail on one rank.


def given(seed: int, parts: bool) -> Any:
    """A tree; of which each rank has a half of the rows, if `parts`."""
    whole = tree(seed, SHAPES)
    return placed(whole, "rows of 2") if parts else whole


def failing_eigh(rank: int, at: int, parts: bool) -> Any:
    """LAPACK converges on nothing on rank 1 at step `at`, a refresh."""
    tx, params = fs.shampoo(0.1, distribute=fs.sharded, **OPTIONS), given(0, parts)
    state, original = tx.init(params), torch.linalg.eigh

    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    reports = []
    for t in range(1, STEPS + 1):
        before = {name: x.clone() for name, x in block_state(state).items()}
        torch.linalg.eigh = broken if t == at and rank == 1 else original
        try:
            updates, state = tx.update(given(t, parts), state, params, donate=True)
        finally:
            torch.linalg.eigh = original
        params = fs.apply_updates(params, updates)
        reports.append(report_of(state))
        if t == at:
            changed = {
                name
                for name, x in block_state(state).items()
                if name.endswith("/value/0") and not torch.equal(x, before[name])
            }
            assert bool(changed) == (rank == 0)
    counts = [int(x) for name, x in block_state(state).items() if name.endswith("/failures")]
    assert set(counts) == {rank}
    assert sum(f.failures for f in health(state, file=io.StringIO()).factors) == sum(counts)
    owned = [name for name in before if name.endswith("/value/0")]
    return whole(params) if parts else params, reports, len(owned)


@pytest.mark.parametrize("parts", [False, True])
def test_a_solver_that_fails_on_one_rank_keeps_old_roots_there(ranks: Ranks, parts: bool) -> None:
    first, second = ranks(2, failing_eigh, 3, parts)
    assert_equal(first[0], second[0])
    assert first[1] == second[1]  # both know of the failures of rank 1, in a row until step 6
    failed = second[2]
    assert failed > 0
    # at step 3, told of after step 5; none at the refresh of step 6, told of after step 8
    expected = [[0, 0, 0, 0]] * 4 + [[0, 0, failed, 1]] * 3 + [[0, 0, failed, 0]]
    assert first[1] == expected


class BombError(Exception):
    """Nothing that anybody expects."""


def bombed(rank: int, guilty: tuple[int, ...], at: int) -> Any:
    def bomb() -> fs.GradientTransformation:
        seen = 0

        def update(updates: Any, state: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at and rank in guilty:
                raise BombError(f"rank {rank}")
            return updates, state

        return fs.GradientTransformation(lambda params: fs.EmptyState(), update)

    def distribute(inner: Any, **options: Any) -> fs.GradientTransformation:
        return fs.sharded(fs.chain(inner, bomb()), **options)

    tx, params = fs.shampoo(0.1, distribute=distribute, **OPTIONS), tree(0, SHAPES)
    state = tx.init(params)
    since, t, caught = time.monotonic(), 0, ""
    try:
        for t in range(1, STEPS + 1):
            updates, state = tx.update(tree(t, SHAPES), state, params)
            params = fs.apply_updates(params, updates)
    except Exception as error:
        caught = f"{type(error).__name__}: {error}"
    total = torch.tensor(1.0)
    dist.all_reduce(total)  # and both can go on
    return t, caught, params, total.item(), time.monotonic() - since


@pytest.mark.parametrize("guilty", [(0,), (1,), (0, 1)], ids=str)
def test_an_exception_on_one_rank_is_raised_on_all_in_the_same_step(
    ranks: Ranks, guilty: tuple[int, ...]
) -> None:
    found = ranks(2, bombed, guilty, 4)
    for rank, (t, caught, params, total, seconds) in enumerate(found):
        assert t == 4
        if rank in guilty:
            assert caught == f"BombError: rank {rank}"
        else:
            assert caught.startswith("RuntimeError: sharded: the optimizer step failed on rank")
            assert f"on rank {guilty[0]} of 2" in caught
        assert_equal(params, clean_run()[3])
        assert total == 2.0
        assert seconds < 10


def unread(rank: int) -> Any:
    """An exchange whose statuses nobody reads, as on a device before step `every`."""
    stack = Stack((4,), torch.float32, torch.device("cpu"), rows=4)
    shards = shards_of({"4": stack}, {"4": (0, 0, 1, 1)}, 2, torch.float32)
    key = torch.device("cpu"), torch.float32, 2 * shards.length
    used = torch.full((shards.length,), 3.0), torch.full((2 * shards.length,), float("nan"))
    transport = AllGather(shards, rank, None, key, {key: used})

    def step(put: Any) -> Any:
        put("4", range(2 * rank, 2 * rank + 2), torch.ones(2, 4))
        if rank == 1:
            raise BombError
        return ()

    try:
        transport.exchange(step, due=False, rank_status=RankStatus())
        assert [rows for _, rows, _ in transport.pieces] == [range(2), range(2, 4)]
        return torch.cat([x for _, _, x in transport.pieces])
    except BombError:
        return None


def test_a_rank_that_failed_sends_zeros_to_those_that_do_not_look(ranks: Ranks) -> None:
    got, none = ranks(2, unread)
    assert none is None
    assert torch.equal(got, torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None].expand(4, 4))


# Too many failures in a row.


def until_the_limit(rank: int, guilty: int, sharding: dict[str, Any], every: int) -> Any:
    distribute = functools.partial(fs.sharded, **sharding)
    options = OPTIONS | {"every": every, "max_failures": 4}
    tx, params = fs.shampoo(0.1, distribute=distribute, **options), tree(0, SHAPES)
    state = tx.init(params)
    i, j = place_of(state, owned=rank == guilty)
    try:
        for t in range(1, 20):
            g = tree(t, SHAPES)
            # Two, and then too many in a row.
            if rank == guilty and t not in (3, 4):
                g["w"][8 * i, 8 * j] = float("nan")
            updates, state = tx.update(g, state, params, donate=True)
            params = fs.apply_updates(params, updates)
    except fs.FailureLimitError as error:
        return t, str(error), f"w block_{i}_{j}: gradient not finite", params
    return None


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(("every", "step"), [(1, 9), (5, 10)])
def test_the_limit_stops_all_ranks_at_one_step_and_names_the_block(
    ranks: Ranks, guilty: int, every: int, step: int
) -> None:
    found = ranks(2, until_the_limit, guilty, {}, every)
    for t, message, named, params in found:
        assert t == step
        assert named in message
        assert "failed 4 times in a row (max_failures=4)" in message
        assert_equal(params, found[0][3])


def until_the_limit_in_parts(rank: int) -> Any:
    """The gradient of the rows that rank 1 has is NaN, from step 3 on."""
    tx = fs.shampoo(0.1, distribute=fs.sharded, **(OPTIONS | {"max_failures": 4}))
    params = given(0, parts=True)
    state = tx.init(params)
    try:
        for t in range(1, 20):
            g = given(t, parts=True)
            if rank == 1 and t > 2:
                g["w"].to_local()[0, 0] = torch.nan
            updates, state = tx.update(g, state, params, donate=True)
            params = fs.apply_updates(params, updates)
    except fs.FailureLimitError as error:
        return t, str(error), whole(params)
    return None


def test_the_limit_of_a_part_stops_all(ranks: Ranks) -> None:
    first, second = ranks(2, until_the_limit_in_parts)
    assert first[:2] == second[:2]
    assert first[0] in range(7, 7 + 2 * OPTIONS["every"])
    assert "w block_1_0: gradient not finite" in first[1]
    assert all(torch.isfinite(x).all() for x in tensors(first[2]))


def roots_until_the_limit(rank: int) -> Any:
    """No root is found on rank 1, from the first refresh on; the chain has no guard."""
    tx = fs.blocked(
        fs.sharded(
            fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(1)), every=2, max_failures=3
        ),
        8,
    )
    params = tree(0, SHAPES)
    state, original = tx.init(params), torch.linalg.eigh

    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    torch.linalg.eigh = broken if rank == 1 else original
    try:
        for t in range(1, 20):
            _, state = tx.update(tree(t, SHAPES), state, params)
    except fs.FailureLimitError as error:
        return t, str(error)
    finally:
        torch.linalg.eigh = original
    return None


def test_roots_that_fail_on_one_rank_stop_all(ranks: Ranks) -> None:
    first, second = ranks(2, roots_until_the_limit)
    assert first == second
    assert first[0] == 4
    assert "refresh of its statistics failed" in first[1]


def around_blocks(rank: int) -> Any:
    """Leaves shared out, blocks inside: the names come from the blocks' own layout."""
    tx = fs.sharded(fs.shampoo(0.1, **(OPTIONS | {"max_failures": None})), max_failures=2, every=1)
    params = tree(0, SHAPES)
    state = tx.init(params)
    try:
        for t in range(1, 9):
            g = tree(t, SHAPES)
            g["w"][0, 0] = float("nan")
            _, state = tx.update(g, state, params)
    except fs.FailureLimitError as error:
        return t, str(error)
    return None


def test_the_block_is_named_where_leaves_are_shared_out(ranks: Ranks) -> None:
    first, second = ranks(2, around_blocks)
    assert first == second
    assert first[0] == 3
    assert "w block_0_0: gradient not finite" in first[1]
