"""How a refresh is executed: in which batches, and in which threads.

Where threads help, they work on different matrices. Two threads on two matrices, each with one
kernel thread, decompose them as fast as MKL's two do one after the other at side 512, and 1.16
times as fast at 1,024; later steps gain more. But the last matrix of a refresh may leave all but
one thread idle for as long as it takes: such matrices are done first, each by all kernel threads.
Those of moderate side always have one kernel thread, so their values match a process with one.

Elsewhere (on a GPU, under a transform, for rules that threads don't help), the matrices of one side
from all stacks are one batch.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from funshampoo.refresh.jobs import Job, Outcome, Rows, joined, outcome, row_slice
from funshampoo.refresh.rule import is_same
from funshampoo.refresh.workers import workers

LARGEST_SIDE = 256
"""Up to this side a matrix has one kernel thread, and several may share a task."""

TASK_SECONDS = 0.025
"""Target duration of a task of several matrices. Smaller ones make the threads wait for Python's
lock: 4 matrices of side 128 at a time take 1.4 times as long as 16."""

LARGEST_BATCH = 2**25
"""Numbers: 32 matrices of side 1,024 occupy a GPU. With more, an iteration's temporaries would be
gigabytes (4.7 for all of GPT-2), which a CUDA graph would keep."""

CACHED_PIECE = 2**20
"""Numbers of one stack that one CPU thread computes at a time: 64 matrices of side 128. On an AMD
EPYC, a transformer's refresh in pieces of 2^19, which stay in its cache, took 0.92 to 0.96 of its
time with whole stacks; on an Intel CPU, 1.03 of that with 2^20, as a piece costs 0.7 ms in Python
and small operators."""

CACHED_BATCH = 2**18
"""Numbers up to which a CPU joins stacks: for small matrices, operator overhead dominates; for
large ones, temporaries of all stacks would exist at once."""


def carry_out(jobs: Sequence[Job], in_blocks: bool) -> None:
    """Do all the work; the results are in `Job.parts`.

    All tasks are started, and all are waited for, before any result is used: an operator here,
    between two waits, would wake this thread's kernel threads, which then spin for milliseconds on
    the cores that the others need.

    Args:
        in_blocks: whether the jobs' matrices are stacks, so that several can form a batch.
    """
    threaded: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        (threaded if job.in_threads() else others).append(job)
    divided = batches if in_blocks else _one_by_one
    for batch in divided(others):
        _task(batch).carry_out()
    tasks = [task for batch in divided(threaded) for task in tasks_of(batch)]
    futures = begin(tasks)
    try:
        for future in futures:
            future.result()
    except BaseException:  # a task's, or Ctrl-C: what is queued would keep the process alive
        for future in futures:
            future.cancel()
        raise


Batch = list[tuple[Job, Rows]]


def batches(jobs: Iterable[Job]) -> list[Batch]:
    """Which rows of which jobs form one call of a rule, for jobs of one kind."""
    kinds: list[list[Job]] = []
    for job in jobs:
        for kind in kinds:
            if _is_alike(job, kind[0]):
                kind.append(job)
                break
        else:
            kinds.append([job])
    return [batch for kind in kinds for batch in _cut(kind)]


def _one_by_one(jobs: Iterable[Job]) -> list[Batch]:
    return [[(job, job.rows)] for job in jobs]


def _is_alike(job: Job, other: Job) -> bool:
    mine, theirs = job.kept.residual, other.kept.residual
    alike = mine.dtype == theirs.dtype and mine.device == theirs.device
    return alike and is_same(job.rule, other.rule)


def _cut(jobs: Sequence[Job]) -> list[Batch]:
    """Batches of `LARGEST_BATCH` numbers at most; on a CPU, of `CACHED_BATCH` or a single job.

    With several CPU threads that job is whole: MKL rounds a stack of one matrix differently.
    """
    whole, numbers = jobs[0].kept.residual.is_cpu, jobs[0].rule.side ** 2
    most = max(1, (CACHED_BATCH if whole else LARGEST_BATCH) // numbers)
    # Not in a graph, which can't ask for the threads.
    alone = whole and not torch.compiler.is_dynamo_compiling() and torch.get_num_threads() == 1
    found: list[Batch] = [[]]
    room = most
    for job in jobs:
        rows = job.every_row()
        while rows:
            if room < (min(len(rows), most) if whole else 1):
                found.append([])
                room = most
            size = len(rows) if whole else room
            size = max(1, CACHED_PIECE // numbers) if alone else size
            part, rows = rows[:size], rows[size:]
            found[-1].append((job, part))
            room -= len(part)
    return found


class Task:
    """A call of a rule, here or in a thread.

    Attributes:
        compute: the call.
        seconds: approximate time of one kernel thread.
        divisible: whether several kernel threads may take part.
        result: the call's result, once it is done; None before it has begun.
    """

    def __init__(
        self, compute: Callable[[], Outcome], seconds: float, divisible: bool = False
    ) -> None:
        self.compute, self.seconds, self.divisible = compute, seconds, divisible
        self.result: Any = None

    def carry_out(self) -> None:
        """Run it now, in this thread."""
        found = self.compute()
        self.result = lambda: found

    def taken(self) -> Outcome:
        """Its result, for the last time: it is not kept here."""
        found: Outcome = self.result()
        self.result = None
        return found


def tasks_of(batch: Batch) -> list[Task]:
    """The tasks of a batch: one for several jobs, unless sides are large; pieces of a sole job."""
    (job, rows), *others = batch
    if others and job.rule.side > LARGEST_SIDE:  # numbers depend on how threads share it
        return [task for one in batch for task in tasks_of([one])]
    if others or job.kept.rounds.ndim == 0:
        return [_task(batch)]
    every = job.every_row() if rows is None else rows
    cuts = pieces(every, job.rule.side, job.rule.cost, torch.get_num_threads())
    return [_task([(job, part)]) for part in cuts]


def _task(batch: Batch) -> Task:
    """The task of a batch; its jobs get their parts of the result."""
    counts = [1 if rows is None else len(rows) for _, rows in batch]
    rule, first = batch[0][0].rule, 0
    seconds = rule.cost * sum(counts)
    task = Task(functools.partial(_found, batch), seconds, rule.side > LARGEST_SIDE)
    for (job, rows), count in zip(batch, counts):
        job.shares = len(batch) > 1
        share = functools.partial(_share, task, first, count)
        job.parts.append((rows, share if job.shares else task.taken))
        first += count
    return task


def _found(batch: Batch) -> Outcome:
    asked = [job.asked(rows) for job, rows in batch]
    return outcome(batch[0][0].rule, joined(asked) if len(asked) > 1 else asked[0])


def _share(task: Task, first: int, count: int) -> Outcome:
    part: Outcome = row_slice(task.result(), first, count)
    return part


def pieces(rows: Sequence[int], side: int, seconds: float, threads: int) -> list[Sequence[int]]:
    """Runs of rows, one per task: of about `TASK_SECONDS`, or less if threads would be idle.

    seconds: time of one row.
    """
    total = len(rows) * seconds
    count = max(math.ceil(total / TASK_SECONDS), min(threads, int(total / 0.002)), 1)
    if count > threads:
        count = math.ceil(count / threads) * threads
    if side > LARGEST_SIDE:
        count = len(rows)
    count = max(1, min(count, len(rows)))
    ends = [len(rows) * i // count for i in range(count + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(ends)]


def begin(tasks: Iterable[Task]) -> list[Future[Outcome]]:
    """Do some of these in this thread, and start the others in threads, the longest first."""
    waiting = sorted(tasks, key=lambda task: -task.seconds)
    if not waiting:
        return []
    threads = torch.get_num_threads()
    for task in _best_here(waiting, threads):
        task.carry_out()
    futures = []
    for task in waiting:
        if task.result is None:
            futures.append(workers(threads).submit(task.compute))
            task.result = futures[-1].result
    return futures


def _best_here(waiting: Sequence[Task], threads: int) -> list[Task]:
    """The tasks, given longest first, that all kernel threads should do together, one by one."""
    divisible = [task for task in waiting if task.divisible]
    others = [task.seconds for task in waiting if not task.divisible]

    def modelled(count: int) -> float:
        here = sum(task.seconds for task in divisible[:count]) / speedup(threads)
        rest = [task.seconds for task in divisible[count:]]
        return here + makespan(sorted(others + rest, reverse=True), threads)

    counts = {*range(min(threads, len(divisible)) + 1), len(divisible)}
    return divisible[: min(sorted(counts), key=modelled)]


def makespan(costs: Iterable[float], threads: int) -> float:
    """When the last thread is done, if each takes the next task when it is free."""
    loads = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def speedup(threads: int) -> float:
    """The gain of a decomposition by several kernel threads: 1.6 by two, measured at 256 to 1,024.

    In this model, a quarter of its time is serial.
    """
    return threads / (1 + (threads - 1) / 4)
