"""Roots computed ahead in a second thread, between the step that asks for them and their use.

What a step returns is a pure function of the state, which holds the matrices whose roots are still
to come. What is here only remembers results: they are looked up by the matrix itself, entry for
entry. Where none is found (the state was resumed from a checkpoint, copied to another process,
batched by vmap, or is used a second time), the root is computed there and then, with one kernel
thread as here, and is the same to the last bit.

What nobody will ask for any more is forgotten with the state that it was for.
"""

from __future__ import annotations

import functools
import os
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from funshampoo.linalg import RootSolver
from funshampoo.refresh.roots import Found, MaybeTensor, RootRule, Rows, taken
from funshampoo.refresh.solving import Solving, in_threads, pieces, result_of, tasks
from funshampoo.refresh.workers import can_run_in_a_thread, workers

MOST_BYTES = 2**32
"""Of matrices that wait for their roots' use, and of these. More is not computed ahead."""

OLDEST = 4096
"""Jobs after which one that nobody has asked for is forgotten, should it have no owner."""


class _Job:
    """The roots of some matrices (n, d, d).

    The matrices are the state's own, not copies. Should somebody write to them meanwhile, their
    version tells, and the result is not used.

    Attributes:
        bytes: of the matrices, and of the roots to come.
        waiting: rows that nobody has asked for yet.
        end: watches over the owner, where there is one.
    """

    def __init__(self, rule: RootRule, matrix: Tensor, basis: MaybeTensor, number: int) -> None:
        self.number = number
        self.end: weakref.finalize[Any, Any] | None = None
        self._inputs = _tensors(matrix, basis)
        if any([x.is_inference() for x in self._inputs]):  # these have no versions
            self._inputs = [x.clone() for x in self._inputs]
        self._versions = self._current_versions()
        self.bytes = _bytes(self._inputs)
        self.waiting = set(range(len(matrix)))
        first, *rest = self._inputs
        self.future: Future[Found] = workers(1, "ahead").submit(
            lambda: rule(first, rest[0] if rest else ())
        )

    def _current_versions(self) -> list[int]:
        return [0 if x.is_inference() else x._version for x in self._inputs]

    def holds(self, first: int, inputs: Sequence[Tensor]) -> bool:
        """Whether its matrices (and bases) from row `first` on are these."""
        return self._versions == self._current_versions() and all(
            torch.equal(mine.narrow(0, first, len(x)), x) for mine, x in zip(self._inputs, inputs)
        )

    def found(self, first: int, rows: int) -> Found:
        """The roots of some rows; waits for them, and raises what the solver raised."""
        part: list[Any] = [taken(x, range(first, first + rows)) for x in self.future.result()]
        return Found(*part)


class _Jobs:
    """The jobs of a process, and which row of which matrix each is for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}  # by number, so the oldest first
        self._rows: dict[Any, tuple[_Job, int]] = {}
        self._keys: dict[int, list[Any]] = {}
        self._count = 0
        self._abandoned: deque[int] = deque()

    def add(self, rule: RootRule, matrix: Tensor, basis: MaybeTensor, owner: Tensor | None) -> None:
        with self._lock:
            self._count += 1
            while self._jobs and next(iter(self._jobs)) < self._count - OLDEST:
                self._forget(next(iter(self._jobs)))
            self._forget_abandoned()
            keys, inputs = _keys(rule, matrix), _tensors(matrix, basis)
            if self._has(keys, inputs):
                return
            if _bytes(inputs) + sum(job.bytes for job in self._jobs.values()) > MOST_BYTES:
                return
            job = self._jobs[self._count] = _Job(rule, matrix, basis, self._count)
            self._keys[job.number] = keys
            self._rows.update((key, (job, i)) for i, key in enumerate(keys))
            if owner is not None:
                job.end = weakref.finalize(owner, self._abandon, job.number)
                job.end.atexit = False

    def _has(self, keys: list[Any], inputs: Sequence[Tensor]) -> bool:
        """Whether these are being computed already: a state may be used twice."""
        places = [self._rows.get(key) for key in keys]
        first = places[0]
        return (
            first is not None
            and _runs(places) == [(0, len(places))]
            and first[0].holds(first[1], inputs)
        )

    def take(self, rule: RootRule, matrix: Tensor) -> list[tuple[_Job, int] | None]:
        """(job, row in it) for each matrix, once."""
        with self._lock:
            places = [self._rows.pop(key, None) for key in _keys(rule, matrix)]
            for place in places:
                if place is not None:
                    job, row = place
                    job.waiting.discard(row)
                    if not job.waiting and job.number in self._jobs:
                        self._forget(job.number, cancel=False)
            return places

    def _forget(self, number: int, cancel: bool = True) -> None:
        job = self._jobs.pop(number)
        if cancel:
            job.future.cancel()
        if job.end is not None:
            job.end.detach()
        for key in self._keys.pop(number):
            if self._rows.get(key, (None,))[0] is job:
                del self._rows[key]

    def _abandon(self, number: int) -> None:
        """Its owner is gone. Called whenever memory is freed, perhaps by who holds the lock."""
        self._abandoned.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._forget_abandoned()
            finally:
                self._lock.release()

    def _forget_abandoned(self) -> None:
        while self._abandoned:
            number = self._abandoned.popleft()
            if number in self._jobs:
                self._forget(number)


_JOBS: dict[int, _Jobs] = {}  # a forked child has no part in its parent's


def _jobs() -> _Jobs:
    return _JOBS.setdefault(os.getpid(), _Jobs())


def compute_ahead(
    rule: RootRule, matrix: Tensor, basis: MaybeTensor, rows: Rows, owner: Tensor
) -> None:
    """Begin to compute the roots of these rows, where a thread can.

    Args:
        matrix: all rows, (N, d, d), or one matrix (d, d).
        basis: of all rows, or ().
        owner: what of the state, or a view of it, stays there until the roots come into use. What
            was computed for a state that is gone is forgotten with it.
    """
    if not _is_fixed(rule) or not can_run_in_a_thread(matrix, basis):
        return
    if matrix.ndim == 2:
        matrix, basis, rows = matrix[None], _one(basis), None
    lasting = _lasting(owner) if rows is None else None  # a turn of other rows replaces it
    for part in pieces(matrix, rows):
        if part:
            _jobs().add(rule, taken(matrix, part), taken(basis, part), lasting)


def computed_ahead(
    rule: RootRule, matrix: Tensor, basis: MaybeTensor, rows: Rows
) -> Solving | Found:
    """The roots of these rows, looked up or else computed."""
    if matrix.ndim == 2:  # as a stack, since the product of two matrices rounds in another way
        found = computed_ahead(rule, matrix[None], _one(basis), None)
        parts: list[Any] = [x[0] if isinstance(x, Tensor) else x for x in result_of(found)]
        return Found(*parts)
    if not can_run_in_a_thread(matrix, basis, *rule.numbers):
        return rule(taken(matrix, rows), taken(basis, rows))
    every: Sequence[int] = range(len(matrix)) if rows is None else rows
    known = _is_fixed(rule)
    places = _jobs().take(rule, taken(matrix, rows)) if known else [None] * len(every)
    pieces_found: list[Callable[[], Found]] = []
    for first, last in _runs(places):
        run, place = every[first:last], places[first]
        inputs = [x for x in (taken(matrix, run), taken(basis, run)) if isinstance(x, Tensor)]
        # A job that has not begun is better done here, by all threads.
        if place is not None and not place[0].future.cancel() and place[0].holds(place[1], inputs):
            pieces_found.append(functools.partial(place[0].found, place[1], last - first))
        else:
            pieces_found += _now(rule, matrix, basis, run)
    return Solving(pieces_found)


def _now(
    rule: RootRule, matrix: Tensor, basis: MaybeTensor, rows: Rows
) -> Sequence[Callable[[], Found]]:
    if in_threads(rule, matrix, basis):
        return tasks(rule, lambda part: taken(matrix, part), basis, rows, matrix, divisible=False)
    found = rule(taken(matrix, rows), taken(basis, rows))
    return [lambda: found]


def _runs(places: Sequence[tuple[_Job, int] | None]) -> list[tuple[int, int]]:
    """(first, last) for runs of rows that follow each other in one job, or are in none."""
    ends = [0]
    for i in range(1, len(places)):
        before, now = places[i - 1], places[i]
        follows = (
            before is now
            if before is None or now is None
            else before[0] is now[0] and before[1] + 1 == now[1]
        )
        if not follows:
            ends.append(i)
    return list(zip(ends, [*ends[1:], len(places)])) if places else [(0, 0)]


def _keys(rule: RootRule, matrix: Tensor) -> list[Any]:
    """What to look matrices (n, d, d) up by. Equal matrices have equal keys."""
    marks = torch.stack(
        [matrix.diagonal(dim1=-2, dim2=-1).sum(-1), matrix[:, 0, 0], matrix[:, 0, -1]], -1
    )
    side = matrix.shape[-1], matrix.dtype
    return [(rule, side, *mark) for mark in marks.tolist()]


def _lasting(x: Tensor) -> Tensor | None:
    """The tensor that lives as long as this memory; None where a view doesn't know it."""
    if x.is_inference():
        return None
    return x if x._base is None else x._base


def _tensors(*given: MaybeTensor) -> list[Tensor]:
    return [x for x in given if isinstance(x, Tensor)]


def _bytes(inputs: Sequence[Tensor]) -> int:
    """Of these, and of as many results."""
    return 2 * sum([x.numel() * x.element_size() for x in inputs])


def _one(basis: MaybeTensor) -> MaybeTensor:
    return basis[None] if isinstance(basis, Tensor) else ()


def _is_fixed(rule: RootRule) -> bool:
    """Whether nothing that the root depends on can be written to before its use: only numbers."""
    solver = rule.solver
    cells = getattr(solver, "__closure__", None) or ()
    held: list[Any] = [*rule.numbers]
    if isinstance(solver, RootSolver):
        held += vars(solver).values()
    elif not isinstance(solver, types.FunctionType):
        return False
    try:
        held += [cell.cell_contents for cell in cells]
        hash(rule)
    except (TypeError, ValueError):  # a solver that can't be told from others; an empty cell
        return False
    return not any([isinstance(x, Tensor) for x in held])
