"""Threads with one kernel thread each: nobody else notices them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from funshampoo.refresh import solving
from funshampoo.refresh.rule import eigh_seconds
from funshampoo.refresh.workers import Workers, can_run_in_a_thread, workers
from tests.sooner import these
from tests.trees import assert_equal, gradients, problem, train


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def kernel_threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_workers_have_one_kernel_thread_and_nobody_else_has() -> None:
    pool = Workers(4)
    barrier = threading.Barrier(4)

    def look() -> int:
        barrier.wait(10)  # so that all four threads take part
        return torch.get_num_threads()

    assert [f.result() for f in [pool.submit(look) for _ in range(4)]] == [1] * 4
    assert torch.get_num_threads() == 2
    assert kernel_threads_of_a_new_thread() == 2
    pool.close()


@pytest.mark.parametrize(
    "error", these(["RuntimeError", "KeyboardInterrupt"], sooner=["RuntimeError"])
)
@pytest.mark.parametrize("started", these(range(4), sooner=[3]))
def test_threads_that_cannot_be_started_leave_none_waiting(started: int, error: str) -> None:
    """Two workers, each with a helper. In another process, which a waiting one would keep alive."""
    script = f"""
import threading
from funshampoo.refresh.workers import Workers
start, left = threading.Thread.start, [None] * {started}
def limited(thread):
    if not left:
        raise {error}("no more")
    left.pop()
    start(thread)
threading.Thread.start = limited
try:
    Workers(2)
except (RuntimeError, KeyboardInterrupt) as failure:
    print(type(failure).__name__, failure)
assert threading.active_count() == 1, threading.enumerate()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "KeyboardInterrupt" in done.stdout or "2 threads for refreshes" in done.stdout


@pytest.mark.slow  # a whole program
def test_a_process_that_trains_in_threads_ends_with_the_threads_it_set() -> None:
    """In a fresh interpreter: whether the number was ever set, and by whom, differs there."""
    script = """
import threading, torch
{setting}
import funshampoo as fs
before = torch.get_num_threads()
params = {{"w": torch.randn(64, 64)}}
tx = fs.shampoo(0.1, every=1)
state = tx.init(params)
updates, state = tx.update(params, state, params)
assert before == 1 or any(t.name.startswith("funshampoo") for t in threading.enumerate())
found = []
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start(); thread.join()
assert (torch.get_num_threads(), found[0]) == (before, before), (before, found)
"""
    for setting in ("", "torch.set_num_threads(3)"):
        code = script.format(setting=setting)
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fails", these(["start", "_take_one_kernel_thread"], sooner=["start"]))
def test_where_threads_can_not_begin_the_process_ends(fails: str) -> None:
    """With an error, not in wait for the others; as where a container has no more threads."""
    script = f"""
import threading
from funshampoo.refresh import workers
where = workers if {fails!r} in vars(workers) else threading.Thread
real, begun = getattr(where, {fails!r}), []
def second_fails(*thread):
    begun.extend(t for t in thread if t.name.startswith("funshampoo"))
    if len(begun) == 2 or where is workers:
        raise RuntimeError("no more threads")
    real(*thread)
setattr(where, {fails!r}, second_fails)
pool = workers.Workers(2)
pool.submit(int).result(10)
raise SystemExit(1)  # or all of it was done here
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "no more threads" in done.stderr


def test_the_callers_modes_go_along() -> None:
    pool = workers(1)

    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert pool.submit(modes).result() == (True, False)
    with torch.no_grad():
        assert pool.submit(modes).result() == (False, False)
    with torch.inference_mode():
        assert pool.submit(modes).result() == modes()


def test_an_error_is_raised_to_whoever_asks() -> None:
    def fail() -> None:
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        workers(1).submit(fail).result()


def test_closing_cancels_what_is_queued_and_waits_for_what_runs() -> None:
    pool, begun, go_on = Workers(1), threading.Event(), threading.Event()

    def run() -> str:
        begun.set()
        go_on.wait(10)
        return "done"

    running, queued = pool.submit(run), pool.submit(run)
    begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    pool.close()
    assert running.result() == "done"
    assert queued.cancelled()
    assert pool.submit(lambda: 3).result() == 3  # too late for the threads: here and now


def test_where_a_task_fails_what_is_queued_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: Future[Any] = Future()
    queued: Future[Any] = Future()
    failed.set_exception(KeyboardInterrupt())
    monkeypatch.setattr(solving, "begin", lambda tasks: [failed, queued])
    with pytest.raises(KeyboardInterrupt):
        solving.carry_out([], in_blocks=True)
    assert queued.cancelled()


def test_what_belongs_to_a_thread_stays_in_it() -> None:
    x = torch.ones(2)
    assert can_run_in_a_thread(x, 1.0, None, ())
    wanted = x.clone().requires_grad_()
    assert not can_run_in_a_thread(wanted)
    with torch.no_grad():
        assert can_run_in_a_thread(wanted)
    assert not can_run_in_a_thread(x.to("meta"))
    with torch.device("cpu"):  # a mode
        assert not can_run_in_a_thread(x)
    with torch.autocast("cpu"):
        assert not can_run_in_a_thread(x)
    seen: list[bool] = []
    vmap(lambda y: (seen.append(can_run_in_a_thread(x)), y)[1])(x)
    assert seen == [False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads() -> None:
    assert workers(1).submit(lambda: 1).result() == 1
    child = os.fork()
    if child == 0:
        ours = workers(1).submit(lambda: 2).result(timeout=20)
        os._exit(0 if ours == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


FORKS = """
import os, sys, threading, time, warnings
import torch
import funshampoo as fs
from funshampoo.core.precision import FullProducts
from funshampoo.refresh import workers
torch.set_num_threads(2)
tx, params = fs.shampoo(0.1, every=1, max_size=8), {"w": torch.ones(32, 8)}
grads = {"w": torch.randn(32, 8)}
_, state = tx.update(grads, tx.init(params), params)
assert workers._POOLS
locks = [workers._SETTING, FullProducts._lock]
held = threading.Event()
def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    time.sleep(0.5)
    for lock in locks:
        lock.release()
threading.Thread(target=hold).start()
held.wait()
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # else torch's own kernel threads may be waited for
    found, state = tx.update(grads, state, params)
    free = all([lock.acquire(timeout=5) for lock in locks])
    os._exit(0 if free and found["w"].isfinite().all() else 1)
deadline = time.monotonic() + 120
while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
    time.sleep(0.05)
if ended == (0, 0):
    os.kill(child, 9)
sys.exit(ended != (child, 0))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_steps_whatever_other_threads_held() -> None:
    """With one kernel thread: torch's own do not exist there, and libgomp would wait for them."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=300)


@pytest.mark.parametrize("stagger", [False, True])
def test_threads_change_no_number(stagger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes by several threads are those of one process with one thread, to the last bit."""
    params, grads = problem(), gradients(5)

    def run() -> Any:
        tx = fs.shampoo(0.1, every=2, max_size=4, stagger=stagger)
        return train(tx, params, grads, fs.apply_updates)

    used: list[int] = []
    original = solving.tasks_of
    monkeypatch.setattr(solving, "tasks_of", lambda *a: (used.append(1), original(*a))[1])
    many = run()
    assert used
    torch.set_num_threads(1)
    used.clear()
    assert_equal(many, run())
    assert not used


def test_pieces_cover_all_rows_once() -> None:
    for n, d in ((8, 256), (200, 40), (1, 128), (32, 128), (10, 512), (9, 4)):
        for rows in (range(n), (3, 1, 4, 7), ()):
            for threads in (1, 2, 3):
                found = solving.pieces(rows, d, eigh_seconds(d), threads)
                assert [row for piece in found for row in piece] == list(rows)
    assert len(solving.pieces(range(32), 128, eigh_seconds(128), 2)) == 2


def test_tasks_are_shared_out() -> None:
    """Long tasks first; one that would leave the other threads idle is done by all of them."""

    def here(*costs: float, threads: int = 2, divisible: bool = True) -> list[float]:
        nothing: Any = lambda: None  # noqa: E731
        tasks = [solving.Task(nothing, cost, divisible) for cost in costs]
        return [task.seconds for task in solving._best_here(tasks, threads)]

    assert here(9.0) == [9.0]  # alone: 9 / 1.6
    assert here(9.0, 9.0) == []  # one a thread
    assert here(9.0, 9.0, 9.0) == [9.0]  # 9 / 1.6 + 9, instead of 18
    assert here(9.0, 4.0, 4.0) == []  # 9, instead of 9 / 1.6 + 4
    assert here(9.0, 9.0, 9.0, threads=8) == []  # 9, instead of 27 / 2.9
    assert here(9.0, divisible=False) == []
    assert solving.makespan([5.0, 4.0, 3.0, 3.0, 3.0], 2) == 10.0
    assert solving.speedup(1) == 1.0


@pytest.mark.parametrize("side", [260, 300])
def test_large_factors_by_threads(side: int) -> None:
    """Alone by all kernel threads, or two at a time: runs repeat, and agree with one thread's."""
    torch.manual_seed(0)
    for blocks in (1, 3):
        # A square of noise is badly conditioned: float32 would agree on some CPUs alone.
        params = {"w": torch.zeros(blocks * side, side, dtype=torch.float64)}
        grads = {"w": torch.randn(blocks * side, side, dtype=torch.float64)}
        tx = fs.shampoo(0.1, max_size=side, every=1)
        torch.set_num_threads(2)
        many, _ = tx.update(grads, tx.init(params), params)
        again, _ = tx.update(grads, tx.init(params), params)
        assert torch.equal(again["w"], many["w"])
        torch.set_num_threads(1)
        one, _ = tx.update(grads, tx.init(params), params)
        torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-5)
