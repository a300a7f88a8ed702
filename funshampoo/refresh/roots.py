"""The roots of a stack's factors: how they are computed, and which of them are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import all_true, row_index
from funshampoo.linalg import Solver
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.products import power
from funshampoo.linalg.solver import where
from funshampoo.operators import packed
from funshampoo.state.stages import FactorRoot

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


def taken(x: Any, rows: Rows) -> Any:
    """Rows of a tensor: a view where they follow each other; what has no rows as it is."""
    if rows is None or not isinstance(x, Tensor) or x.ndim == 0:
        return x
    if isinstance(rows, range):
        return x.narrow(0, rows.start, len(rows))
    return x.index_select(0, row_index(tuple(rows), x.device))


def put(x: Any, rows: Rows, new: Any) -> Any:
    """x with new values in these rows."""
    if rows is None or not isinstance(x, Tensor):
        return new
    return x.index_copy(0, row_index(tuple(rows), x.device), new)


def overwrite(x: Any, rows: Rows, new: Any) -> None:
    """Write new values into these rows of x."""
    if not isinstance(x, Tensor):
        return
    if rows is None or isinstance(rows, range):
        taken(x, rows).copy_(new)
    else:
        x.index_copy_(0, row_index(tuple(rows), x.device), new)


def renewed(found: Found, old: FactorRoot) -> FactorRoot:
    """The new roots where the solver converged on statistics that are not zero, else the old."""
    accepted = found.converged & found.known
    if accepted.device.type == "cpu" and all_true(accepted):
        return old._replace(
            root=packed.like(found.root, old.root),
            residual=found.residual.detach(),
            condition=found.condition.detach(),
            streak=torch.zeros_like(old.streak),
            basis=found.basis,
        )
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
