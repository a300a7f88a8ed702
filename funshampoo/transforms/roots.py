"""The work of a refresh: which rows of which stacks, in which threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.base import Hyper
from funshampoo.linalg import Solver, packed
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.products import power
from funshampoo.linalg.solver import where
from funshampoo.state.stages import FactorRoot
from funshampoo.workers import Workers, can_run_in_a_thread, workers

LARGEST_SIDE = 256
"""Up to this side, roots by eigendecomposition are computed with one kernel thread a matrix.

Two threads on different matrices of side 512 are about as fast as MKL's two on one, and a stack of
one such matrix is slower.
"""

Rows = Sequence[int] | None
"""Rows of a stack; None: all, or the one matrix of a leaf."""

MaybeTensor = Tensor | tuple[()]


class Found(NamedTuple):
    """What a solver found for matrices (..., d, d): an `InverseRoot`, and beside it

    known: (...), bool, False where a matrix is exactly zero.
    basis: (..., d, d), for `FactorRoot.basis`; ().
    """

    root: Tensor
    residual: Tensor
    condition: Tensor
    converged: Tensor
    known: Tensor
    basis: MaybeTensor


@dataclass(frozen=True)
class RootRule:
    """How the root of a bias-corrected factor of one side is computed.

    Attributes:
        solver, epsilon, trace_scaling, basis_tolerance: of `root_inverse`.
        p: the root's, X = A^(-1/p).
    """

    solver: Solver
    p: float
    epsilon: Hyper
    trace_scaling: Hyper | None
    basis_tolerance: Hyper | None

    @property
    def numbers(self) -> tuple[Hyper | None, ...]:
        """The hyperparameters, but for the solver's own."""
        return self.epsilon, self.trace_scaling, self.basis_tolerance

    def __call__(self, matrix: Tensor, basis: MaybeTensor) -> Found:
        """The roots of matrices (..., d, d)."""
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        if self.trace_scaling is not None:
            matrix = _trace_scaled(matrix, trace, self.trace_scaling, self.epsilon)
        if self.basis_tolerance is None or not isinstance(basis, Tensor):
            return Found(*self.solver(matrix, self.p, self.epsilon), trace != 0, ())
        assert isinstance(self.solver, EigenSolver)
        found, basis = self.solver.near_basis(
            matrix, self.p, self.epsilon, basis, self.basis_tolerance
        )
        return Found(*found, trace != 0, basis)


class Solving:
    """Roots on their way.

    Attributes:
        parts: functions that wait for some rows each, in the order of the rows.
    """

    def __init__(self, parts: list[Callable[[], Found]]) -> None:
        self.parts = parts


def result_of(found: Solving | Found) -> Found:
    """Wait for roots that are on their way."""
    if isinstance(found, Found):
        return found
    parts = [part() for part in found.parts]
    if len(parts) == 1:
        return parts[0]
    columns: list[Any] = [
        torch.cat(column) if isinstance(column[0], Tensor) else () for column in zip(*parts)
    ]
    return Found(*columns)


def solving(
    rule: RootRule, matrix_of: Callable[[Rows], Tensor], basis: MaybeTensor, rows: Rows, like: Any
) -> Solving | Found:
    """Begin to compute roots: several threads on different rows where that helps, or here and now.

    Args:
        matrix_of: the bias-corrected factors of rows.
        basis: of all rows, or ().
        like: tensors that `matrix_of` reads; the first one has the shape (..., d, d), or is packed.
    """
    side = packed.side_of(like[0])
    moderate = isinstance(rule.solver, EigenSolver) and side <= LARGEST_SIDE
    pool = pool_for(rule, *like, basis) if moderate else None
    if pool is None:
        return rule(matrix_of(rows), taken(basis, rows))
    return in_threads(pool, rule, matrix_of, basis, rows, like[0])


def pool_for(rule: RootRule, *tensors: Any) -> Workers | None:
    """As many threads as the process has kernel threads, if there are several to be had."""
    if torch.compiler.is_compiling():
        return None
    threads = torch.get_num_threads()
    portable = can_run_in_a_thread(*rule.numbers, *tensors)
    return workers(threads) if threads > 1 and portable else None


def in_threads(
    pool: Workers,
    rule: RootRule,
    matrix_of: Callable[[Rows], Tensor],
    basis: MaybeTensor,
    rows: Rows,
    like: Tensor,
) -> Solving:
    """Hand the rows to the threads, piece by piece."""

    def compute(part: Rows) -> Callable[[], Found]:
        return lambda: rule(matrix_of(part), taken(basis, part))

    return Solving([pool.submit(compute(part)).result for part in pieces(like, rows, pool.count)])


def pieces(like: Tensor, rows: Rows, threads: int = 1) -> list[Rows]:
    """Runs of rows that take about 25 ms each, or less where threads would be idle.

    Smaller ones make the threads wait for Python's lock: 4 matrices of side 128 at a time take 1.4
    times as long as 16.

    like: the whole stack, (N, d, d), or one matrix.
    """
    if like.ndim < 3:
        return [None]
    every: Sequence[int] = range(like.shape[0]) if rows is None else rows
    milliseconds = len(every) * (like.shape[-1] / 128) ** 2
    count = max(math.ceil(milliseconds / 25), min(threads, int(milliseconds / 2)), 1)
    if count > threads:
        count = math.ceil(count / threads) * threads
    count = max(1, min(count, len(every)))
    ends = [len(every) * i // count for i in range(count + 1)]
    return [every[a:b] for a, b in itertools.pairwise(ends)]


def taken(x: Any, rows: Rows) -> Any:
    """Rows of a tensor: a view where they follow each other; what has no rows as it is."""
    if rows is None or not isinstance(x, Tensor) or x.ndim == 0:
        return x
    if isinstance(rows, range):
        return x.narrow(0, rows.start, len(rows))
    return x.index_select(0, torch.tensor(rows, dtype=torch.int64, device=x.device))


def put(x: Any, rows: Rows, new: Any) -> Any:
    """x with new values in these rows."""
    if rows is None or not isinstance(x, Tensor):
        return new
    return x.index_copy(0, torch.tensor(list(rows), dtype=torch.int64, device=x.device), new)


def renewed(found: Found, old: FactorRoot) -> FactorRoot:
    """The new roots where the solver converged on statistics that are not zero, else the old."""
    accepted = found.converged & found.known
    failed = found.known & ~found.converged

    def chosen(new: Tensor, before: Any) -> Any:
        return where(accepted, new, before)

    return old._replace(
        root=chosen(packed.like(found.root, old.root), old.root),
        residual=torch.where(accepted, found.residual, old.residual).detach(),
        condition=torch.where(accepted, found.condition, old.condition).detach(),
        failures=old.failures + failed,
        streak=torch.where(failed, old.streak + 1, 0),
        basis=chosen(found.basis, old.basis) if isinstance(found.basis, Tensor) else (),
    )


def handed_over(found: Found, old: FactorRoot) -> FactorRoot:
    """`renewed` where a root was waited for; nothing changes elsewhere."""
    assert isinstance(old.waiting, Tensor)
    waiting = old.waiting > 0
    new = renewed(found._replace(known=found.known & waiting), old)
    return new._replace(
        streak=torch.where(waiting, new.streak, old.streak), waiting=torch.zeros_like(old.waiting)
    )


def renewed_at_once(found: Found, old: FactorRoot) -> FactorRoot:
    """`renewed`, after which an older root that was waited for is not wanted any more."""
    waiting = torch.zeros_like(old.waiting) if isinstance(old.waiting, Tensor) else ()
    return renewed(found, old)._replace(waiting=waiting)


def _trace_scaled(matrix: Tensor, trace: Tensor, exponent: Hyper, epsilon: Hyper) -> Tensor:
    """A max(tr A, epsilon)^(-exponent); A itself where that is zero, which has no derivative."""
    floor = epsilon.to(trace) if isinstance(epsilon, Tensor) else trace.new_tensor(epsilon)
    size = torch.maximum(trace, floor)
    scale = power(torch.where(size > 0, size, 1.0), -exponent)
    return matrix * scale[..., None, None]
