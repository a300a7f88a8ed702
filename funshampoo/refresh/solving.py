"""The work of a refresh: which roots are computed in which threads.

Two threads on two matrices, each with one kernel thread, decompose them as fast as MKL's two do one
after the other at side 512, and 1.16 times as fast at 1,024; what follows gains more. But the last
matrix of a refresh may leave all threads but one without work, for as long as it takes: such are
done first, each by all kernel threads. Roots that are looked up later by their numbers, and those
of moderate sides, have one kernel thread always: their numbers are those of a process with one.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.operators import packed
from funshampoo.refresh.roots import Found, MaybeTensor, RootRule, Rows, taken
from funshampoo.refresh.workers import Workers, can_run_in_a_thread, workers

LARGEST_SIDE = 256
"""Up to this side a matrix has one kernel thread, and some share a task."""

MILLISECONDS = 25
"""About what a task of several matrices takes. Smaller ones make the threads wait for Python's
lock: 4 matrices of side 128 at a time take 1.4 times as long as 16."""


class Task:
    """Roots of some rows of a stack, to be computed.

    Attributes:
        milliseconds: about what one kernel thread needs.
        divisible: whether several kernel threads may take part.
    """

    def __init__(
        self, compute: Callable[[], Found], milliseconds: float, divisible: bool = False
    ) -> None:
        self.milliseconds = milliseconds
        self.divisible = divisible
        self._compute = compute
        self._future: Future[Found] | None = None

    @property
    def begun(self) -> bool:
        """Whether somebody is at it, or through."""
        return self._future is not None

    def begin(self, pool: Workers) -> None:
        """In one of these threads, when it has time."""
        self._future = pool.submit(self._compute)

    def carry_out(self) -> None:
        """Here and now."""
        found = self._compute()
        self._future = Future()
        self._future.set_result(found)

    def __call__(self) -> Found:
        """Wait for what it finds; `begin` or `carry_out` has been called."""
        assert self._future is not None
        return self._future.result()

    def release(self) -> Found:
        """As a call, and the last: what was found is not kept here."""
        found, self._future = self(), None
        return found


class Solving:
    """Roots on their way.

    Attributes:
        parts: `Task`s, or functions that wait for what was begun before; some rows each, in the
            order of the rows.
    """

    def __init__(self, parts: Sequence[Callable[[], Found]]) -> None:
        self.parts = parts

    def results(self, rows: Rows) -> Iterator[tuple[Rows, Found]]:
        """Which of the rows, and what was found for them; part by part, each let go of then.

        rows: all that it was asked for. The parts have been begun.
        """
        first = 0
        for part in self.parts:
            found = part.release() if isinstance(part, Task) else part()
            if found.residual.ndim == 0:  # the one matrix of a leaf
                yield rows, found
                continue
            last = first + len(found.residual)
            yield (range(first, last) if rows is None else rows[first:last]), found
            first = last


def solving(
    rule: RootRule, matrix_of: Callable[[Rows], Tensor], basis: MaybeTensor, rows: Rows, like: Any
) -> Solving | Found:
    """Roots to be computed by threads; or computed, where threads don't help.

    Args:
        matrix_of: the bias-corrected factors of rows.
        basis: of all rows, or ().
        like: tensors that `matrix_of` reads; the first one has the shape (..., d, d), or is packed.
    """
    threaded = isinstance(rule.solver, EigenSolver) and in_threads(rule, *like, basis)
    if not threaded:
        return rule(matrix_of(rows), taken(basis, rows))
    return Solving(tasks(rule, matrix_of, basis, rows, like[0]))


def in_threads(rule: RootRule, *tensors: Any) -> bool:
    """Whether the process has several kernel threads, and other threads may do this."""
    return can_run_in_a_thread(*rule.numbers, *tensors) and torch.get_num_threads() > 1


def tasks(
    rule: RootRule,
    matrix_of: Callable[[Rows], Tensor],
    basis: MaybeTensor,
    rows: Rows,
    like: Tensor,
    *,
    divisible: bool = True,
) -> list[Task]:
    """The rows, piece by piece. `like` is the whole stack, (N, d, d), or packed."""
    side = packed.side_of(like)
    each = milliseconds(side)

    def compute(part: Rows) -> Found:
        return rule(matrix_of(part), taken(basis, part))

    found = []
    for part in pieces(like, rows, torch.get_num_threads()):
        cost = each * (1 if part is None else len(part))
        divided = divisible and side > LARGEST_SIDE
        found.append(Task(functools.partial(compute, part), cost, divided))
    return found


def begin(parts: Iterable[Any]) -> None:
    """Begin all tasks among these: some here and now, the others in threads, the longest first."""
    waiting = [x for x in parts if isinstance(x, Task) and not x.begun]
    if not waiting:
        return
    threads = torch.get_num_threads()
    waiting.sort(key=lambda task: -task.milliseconds)
    here = _best_here(waiting, threads)
    for task in here:
        task.carry_out()
    for task in waiting:
        if not task.begun:
            task.begin(workers(threads))


def _best_here(waiting: Sequence[Task], threads: int) -> list[Task]:
    """Those of the tasks, the longest first, that had better be done one by one by all threads."""
    divisible = [task for task in waiting if task.divisible]
    others = [task.milliseconds for task in waiting if not task.divisible]

    def modelled(count: int) -> float:
        here = sum(task.milliseconds for task in divisible[:count]) / speedup(threads)
        rest = [task.milliseconds for task in divisible[count:]]
        return here + makespan(sorted(others + rest, reverse=True), threads)

    counts = {*range(min(threads, len(divisible)) + 1), len(divisible)}
    return divisible[: min(sorted(counts), key=modelled)]


def makespan(costs: Iterable[float], threads: int) -> float:
    """When the last thread is done, if each takes the next of these when it has time."""
    loads = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def milliseconds(side: int) -> float:
    """For one kernel thread to find a root, about: 0.8 at side 128, 20 at 512, 120 at 1,024."""
    unit = side / 128
    return unit**2 * (0.6 + 0.16 * unit)


def speedup(threads: int) -> float:
    """Of one decomposition by several kernel threads: 1.6 by two, as measured at 256 to 1,024.

    A quarter of its time, in this model, is not shared.
    """
    return threads / (1 + (threads - 1) / 4)


def result_of(found: Solving | Found) -> Found:
    """Wait for roots that are on their way."""
    if isinstance(found, Found):
        return found
    begin(found.parts)
    parts = [part() for part in found.parts]
    if len(parts) == 1:
        return parts[0]
    columns: list[Any] = [
        torch.cat(column) if isinstance(column[0], Tensor) else () for column in zip(*parts)
    ]
    return Found(*columns)


def pieces(like: Tensor, rows: Rows, threads: int = 1) -> list[Rows]:
    """Runs of rows for one task each: of about `MILLISECONDS`, or less where threads would be idle.

    like: the whole stack, (N, d, d), packed or not, or one matrix.
    """
    if like.ndim < 3:
        return [None]
    every: Sequence[int] = range(like.shape[0]) if rows is None else rows
    side = packed.side_of(like)
    total = len(every) * milliseconds(side)
    count = max(math.ceil(total / MILLISECONDS), min(threads, int(total / 2)), 1)
    if count > threads:
        count = math.ceil(count / threads) * threads
    if side > LARGEST_SIDE:
        count = len(every)
    count = max(1, min(count, len(every)))
    ends = [len(every) * i // count for i in range(count + 1)]
    return [every[a:b] for a, b in itertools.pairwise(ends)]
