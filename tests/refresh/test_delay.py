"""Roots in a second thread: used exactly `delay` steps later, and a function of the state alone."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import linalg
from funshampoo.refresh import ahead, roots
from funshampoo.state import FactorRoot, find_state
from funshampoo.state.places import map_tensors
from tests.trees import assert_equal, tensors

N, D = 5, 12
SHAPE = (N, D, 7)


def gradient(t: int, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    return {"s": torch.randn(shape, generator=torch.Generator().manual_seed(t))}


def chain(every: int = 4, **options: Any) -> fs.GradientTransformation:
    return fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(every, **options))


def start(tx: fs.GradientTransformation, **context: Any) -> Any:
    return tx.init(gradient(0), block_ndim=1, **context)


def step(tx: fs.GradientTransformation, state: Any, t: int, **context: Any) -> Any:
    ids = {"block_ids": {"s": range(N)}}
    g = context.pop("g", gradient(t))
    return tx.update(g, state, block_ndim=1, gradient=g, **{**ids, **context})[1]


def sides(state: Any) -> list[FactorRoot]:
    return list(state["root_inverse"].roots["s"])


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    ahead._JOBS.clear()
    yield
    ahead._JOBS.clear()


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(thread, matrices) of every call of a solver."""
    calls: list[tuple[str, int]] = []
    original = roots.RootRule.__call__

    def counted(self: Any, matrix: Tensor, basis: Any) -> Any:
        calls.append((threading.current_thread().name, len(matrix)))
        return original(self, matrix, basis)

    monkeypatch.setattr(roots.RootRule, "__call__", counted)
    return calls


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(("every", "delay", "first"), [(4, 1, 1), (4, 3, 1), (3, 2, 4)])
def test_roots_come_into_use_exactly_delay_steps_later(
    stagger: bool, every: int, delay: int, first: int
) -> None:
    """Every row's root is, to the last bit, the one that it has `delay` steps before without."""
    options: dict[str, Any] = {"every": every, "start": first, "stagger": stagger}
    at_once, delayed = chain(**options), chain(**options, delay=delay)
    state, late = start(at_once), start(delayed)
    history = [[side.root for side in sides(state)]]
    changes = 0
    for t in range(1, 16):
        state, late = step(at_once, state, t), step(delayed, late, t)
        history.append([side.root for side in sides(state)])
        known = first if first <= t < first + delay else t - delay
        expected = history[max(known, 0)]
        for side, root in zip(sides(late), expected):
            assert torch.equal(side.root, root), t
        changes += not all(map(torch.equal, history[t], history[t - 1]))
    assert changes > 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("solver", [None, linalg.coupled_newton(), linalg.newton_schulz()])
def test_computed_ahead_or_not_is_the_same(
    threads: int, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tx = chain(3, delay=2, solver=solver)
        ends = []
        for known in (True, False):
            if not known:
                monkeypatch.setattr(ahead._Jobs, "add", lambda *args: None)
            state = start(tx)
            for t in range(1, 9):
                state = step(tx, state, t)
            ends.append(state)
        assert_equal(*ends)
    finally:
        torch.set_num_threads(before)


def test_each_root_is_solved_once_and_not_by_the_caller(solved: list[tuple[str, int]]) -> None:
    tx = chain(4, delay=2)
    state = step(tx, start(tx), 1)
    solved.clear()  # the first refresh was at once
    for t in range(2, 13):
        state = step(tx, state, t)
        for job in list(ahead._jobs()._jobs.values()):
            job.future.result()  # a slow caller: one that was not begun would be done at once
    assert sum(n for _, n in solved) == 3 * 2 * N  # steps 4, 8 and 12, two sides
    assert {thread for thread, _ in solved} == {"funshampoo-0"}
    assert len(ahead._jobs()._rows) == 2 * N


def test_rows_are_found_whatever_slices_they_come_in(solved: list[tuple[str, int]]) -> None:
    """As in a tiled step: the state cut by rows, every slice stepped, and written to its place."""
    tx = chain(4, delay=2)
    whole = [start(tx)]
    for t in range(1, 10):
        whole.append(step(tx, whole[-1], t))
    ahead._JOBS.clear()
    parts = [range(2), range(2, N)]

    def cut(tree: Any, rows: range) -> Any:
        function = lambda x: x[rows.start : rows.stop] if x.ndim else x.clone()  # noqa: E731
        return map_tensors(lambda place, x: function(x), tree, stacks={"s"})

    state = start(tx)
    for t in range(1, 10):
        solved.clear()
        pieces = []
        for rows in parts:
            g = {"s": gradient(t)["s"][rows.start : rows.stop]}
            pieces.append(step(tx, cut(state, rows), t, g=g, block_ids={"s": rows}))
        for job in list(ahead._jobs()._jobs.values()):
            job.future.result()
        if t == 6:
            assert not solved
        join = lambda place, x, a, b: x.copy_(torch.cat([a, b]) if a.ndim else a)  # noqa: E731
        state = map_tensors(join, state, *pieces, stacks={"s"})
        assert_equal(state, whole[t])


def test_a_state_that_is_used_twice_gives_the_same_twice() -> None:
    tx = chain(4, delay=2)
    state = start(tx)
    for t in range(1, 4):
        state = step(tx, state, t)
    one, other = step(tx, state, 4), step(tx, state, 4)
    assert_equal(one, other)
    branch = step(tx, state, 77)  # the same step with another gradient
    for t in (5, 6):
        one, other, branch = (step(tx, s, t) for s in (one, other, branch))
    assert_equal(one, other)
    assert not torch.equal(sides(one)[0].root, sides(branch)[0].root)
    ahead._JOBS.clear()
    fresh = step(tx, state, 77)
    for t in (5, 6):
        ahead._JOBS.clear()
        fresh = step(tx, fresh, t)
    assert_equal(fresh, branch)


def test_a_checkpoint_between_refresh_and_use_resumes_exactly() -> None:
    def run(resume: bool) -> Any:
        tx = fs.shampoo(0.1, every=4, delay=2, max_size=4, basis_tolerance=0.1)
        params = {"w": gradient(0, (7, 9))["s"]}
        state = tx.init(params)
        for t in range(1, 10):
            if resume and t == 6:
                file = io.BytesIO()
                torch.save(fs.state.state_dict(state), file)
                file.seek(0)
                ahead._JOBS.clear()
                saved = torch.load(file, weights_only=True)
                state = fs.state.load_state_dict(tx.init(params), saved).state
            g = {"w": gradient(t, (7, 9))["s"]}
            updates, state = tx.update(g, state, params)
            params = fs.apply_updates(params, updates)
        return params, state

    assert_equal(run(True), run(False))


def test_a_state_that_was_written_to_is_believed() -> None:
    tx = chain(4, delay=2)
    state = start(tx)
    for t in range(1, 6):
        state = step(tx, state, t)
    copied = copy.deepcopy(state)
    for _, x in (("state", sides(state)[0].pending), ("copy", sides(copied)[0].pending)):
        assert isinstance(x, Tensor)
        x.mul_(2)
    state, copied = step(tx, state, 6), step(tx, copied, 6)
    assert_equal(state, copied)


def test_an_exception_is_raised_at_the_hand_over() -> None:
    calls: list[int] = []
    good = linalg.eigh(relative_epsilon=1e-6)

    def solver(matrix: Tensor, p: float, epsilon: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:  # after the first refresh
            raise ZeroDivisionError("in the thread")
        return good(matrix, p, epsilon)

    tx = chain(4, delay=2, solver=solver)
    state = start(tx)
    for t in range(1, 6):
        state = step(tx, state, t)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        step(tx, state, 6)


def test_failures_are_counted_at_the_hand_over() -> None:
    good = linalg.eigh(relative_epsilon=1e-6)
    bad = torch.arange(N) == 3

    def solver(matrix: Tensor, p: float, epsilon: Any) -> Any:
        found = good(matrix, p, epsilon)
        return found._replace(converged=found.converged & ~bad)

    tx = chain(4, delay=2, solver=solver)
    state, counts = start(tx), []
    for t in range(1, 12):
        state = step(tx, state, t)
        counts.append(sides(state)[0].streak.tolist()[3])
        assert sides(state)[0].failures.tolist()[:3] == [0, 0, 0]
    assert counts == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_refresh_in_the_context_is_at_once_and_drops_what_waits() -> None:
    tx = chain(4, delay=2)
    state = start(tx)
    for t in range(1, 5):
        state = step(tx, state, t)
    assert sides(state)[0].waiting.tolist() == [1] * N  # type: ignore[union-attr]
    state = step(tx, state, 5, refresh=True)
    newest = sides(state)[0].root
    assert torch.equal(newest, sides(step(chain(1), state, 5, step=9))[0].root) is False
    state = step(tx, state, 6)
    assert torch.equal(sides(state)[0].root, newest)  # not the older one of step 4


def test_a_rebuilt_chain_finds_what_the_last_one_asked_for(solved: list[tuple[str, int]]) -> None:
    """As in the wrapper, under a learning rate schedule."""
    state = step(chain(4, delay=2), start(chain(4, delay=2)), 1)
    solved.clear()
    for t in range(2, 8):
        state = step(chain(4, delay=2), state, t)
        for job in list(ahead._jobs()._jobs.values()):
            job.future.result()
    assert sum(n for _, n in solved) == 2 * N


def test_hyperparameters_that_may_be_written_to_are_read_at_the_hand_over(
    solved: list[tuple[str, int]],
) -> None:
    epsilon = torch.tensor(1e-3)
    for options in (
        {"epsilon": epsilon},
        {"basis_tolerance": epsilon},
        {"solver": linalg.eigh(relative_epsilon=epsilon)},
        {"solver": linalg.coupled_newton(relative_epsilon=epsilon)},
    ):
        tx = chain(4, delay=2, **options)
        state = start(tx)
        for t in range(1, 6):
            state = step(tx, state, t)
        assert not ahead._jobs()._jobs
        step(tx, state, 6)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tx = chain(4, delay=2)
    state = start(tx)
    for t in range(1, 4):
        state = step(tx, state, t)
    monkeypatch.setattr(ahead, "OLDEST", 6)
    for seed in range(100, 120):
        step(tx, state, seed, step=4)  # states that nobody goes on with
    jobs = ahead._jobs()
    assert len(jobs._jobs) <= 7
    assert set(jobs._jobs) == set(jobs._keys)
    assert {job for job, _ in jobs._rows.values()} == set(jobs._jobs.values())
    monkeypatch.setattr(ahead, "MOST_BYTES", 0)
    before = len(jobs._jobs)
    step(tx, state, 4)
    assert len(jobs._jobs) <= before


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("wrapper", [False, True])
def test_what_waits_for_a_state_goes_with_it(
    wrapper: bool, absent: bool, solved: list[tuple[str, int]]
) -> None:
    def watchers() -> list[Any]:
        registry = weakref.finalize._registry.values()  # type: ignore[attr-defined]
        return [info for info in registry if getattr(info.func, "__name__", "") == "_abandon"]

    for _ in range(3):
        shapes = {"w": (5, 4), "b": (5,), "c": (3, 3)}
        params = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in shapes.items()}
        optimizer = fs.Shampoo(params.items(), every=4, delay=2, max_size=3)
        tx = fs.shampoo(0.1, every=4, delay=2, max_size=3)
        state = tx.init(params)
        counts = []
        for t in range(1, 14):
            draw = torch.Generator().manual_seed(t)
            g = {name: torch.randn(p.shape, generator=draw) for name, p in params.items()}
            g |= {"c": None} if absent else {}
            if wrapper:
                for name, p in params.items():
                    p.grad = g[name]
                optimizer.step()
            else:
                _, state = tx.update(g, state, params)
            for job in list(ahead._jobs()._jobs.values()):
                job.future.result()
            assert absent or t == 1 or all("funshampoo" in thread for thread, _ in solved)
            solved.clear()
            counts.append(len(ahead._jobs()._jobs))
        asked = counts[3]
        assert asked > 0
        assert counts == 3 * [0] + 2 * [asked, asked, 0, 0] + [asked, asked]  # asked on 4, 8, 12
        optimizer = state = params = p = g = job = None
        gc.collect()
        assert not ahead._jobs()._jobs
        assert not ahead._jobs()._rows
        assert not watchers()


def test_the_interpreter_exits_while_roots_are_on_their_way() -> None:
    script = """
import time, torch, funshampoo as fs
tx = fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(4, delay=2))
g = {"s": torch.randn(60, 300, 2)}
state = tx.init(g, block_ndim=1)
for t in range(1, 5):
    _, state = tx.update(g, state, block_ndim=1, refresh=None if t == 4 else False)
begin = time.monotonic()
import atexit
atexit._run_exitfuncs()
assert time.monotonic() - begin < 10
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"delay": 4}, ValueError, "delay is 4; it must be less than every, 4"),
        ({"delay": -1}, ValueError, "delay is -1"),
        ({"delay": 1.0}, TypeError, "delay is 1.0"),
        ({"basis_tolerance": -0.1}, ValueError, "basis_tolerance is -0.1"),
        (
            {"basis_tolerance": 0.1, "solver": linalg.coupled_newton()},
            ValueError,
            "needs a solver that works in an eigenbasis: give linalg.eigh",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        chain(4, **options)


def test_reports_know_the_new_fields() -> None:
    tx = fs.shampoo(0.1, every=4, delay=2, basis_tolerance=0.1)
    params = {"w": gradient(0, (7, 9))["s"]}
    _, state = tx.update(params, tx.init(params), params)
    names = fs.state.state_dict(state)
    for field in ("basis", "pending", "waiting"):
        assert any(name.endswith(f"/{field}") or f"/{field}/" in name for name in names)
    found = fs.state.health(state, file=io.StringIO())
    assert found.factors[0].matrices == 1
    memory = fs.state.summary(state, file=io.StringIO())
    assert memory.total == sum(x.numel() * x.element_size() for x in tensors(state))
    root = find_state(state, FactorRoot)
    assert root is not None
    assert root.waiting.dtype == torch.int64  # type: ignore[union-attr]
