"""The processes that the other tests use come to an end, whatever happens in them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.slow  # each test starts processes


@pytest.fixture
def own() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


def rank_of_sum(rank: int) -> tuple[int, float]:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def fail(rank: int) -> None:
    if rank == 1:
        raise KeyError("this one")
    dist.barrier()


def sleep(rank: int) -> int:
    if rank == 1:
        time.sleep(600)
    return os.getpid()


def leave(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    dist.barrier()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_after_stop_no_process_is_alive(own: Ranks) -> None:
    first = own(2, rank_of_sum)
    assert [total for _, total in first] == [1.0, 1.0]
    assert not any(gone(pid) for pid, _ in first)
    own.stop()
    assert all(gone(pid) for pid, _ in first)
    again = own(2, rank_of_sum)
    assert not {pid for pid, _ in again} & {pid for pid, _ in first}


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail, "KeyError: 'this one'"), (sleep, "rank 1 of 2 gave no answer"), (leave, "ended")],
)
def test_a_rank_that_fails_hangs_or_leaves_is_a_failure_and_nothing_stays(
    own: Ranks, function: object, message: str
) -> None:
    pids = [pid for pid, _ in own(2, rank_of_sum)]
    own.timeout, since = 3.0, time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=message):
        own(2, function)
    assert time.monotonic() - since < 20
    assert all(gone(pid) for pid in pids)


def test_a_connection_that_fails_is_tried_again(own: Ranks) -> None:
    assert own(1, sleep)  # store1
    (Path(own.folder) / "store2").mkdir()  # where a file is wanted
    assert [total for _, total in own(2, rank_of_sum)] == [1.0, 1.0]
    assert own.groups == 3
