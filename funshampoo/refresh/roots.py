"""Inverse roots as periodically refreshed values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.contract import Block, Hyper
from funshampoo.core.live import Numbers, number, resolved
from funshampoo.core.tree import cast
from funshampoo.linalg import Solver
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.products import power
from funshampoo.linalg.solver import relative_cost
from funshampoo.linalg.support import on_support
from funshampoo.operators.exponents import Exponents, Sides, side_exponents
from funshampoo.refresh.rule import Found, Rule


@dataclass(frozen=True)
class RootRule(Rule):
    """X = (A + epsilon I)^(-e), A a bias-corrected factor, optionally scaled by its trace.

    The value is X and, with `basis_tolerance`, the eigenvectors from which it was computed.

    Attributes:
        exponent: e.
        initial_value: X = initial_value · I before the first refresh.
        solver, epsilon, trace_scaling, basis_tolerance: as in `root_inverse`.
    """

    exponent: float
    initial_value: float
    solver: Solver
    epsilon: Hyper
    trace_scaling: Hyper | None
    basis_tolerance: Hyper | None

    symmetric = (0,)

    @property
    def threaded(self) -> bool:
        """The solver's."""
        return bool(getattr(self.solver, "threaded", False))

    @property
    def relative_cost(self) -> float:
        """The solver's."""
        return relative_cost(self.solver)

    @property
    def reads_old(self) -> bool:
        """Whether it can continue in an old basis."""
        return self.basis_tolerance is not None

    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """A multiple of the identity; for a basis, the identity."""
        eye = torch.eye(self.side, dtype=like.dtype, device=like.device).expand(like.shape)
        return (self.initial_value * eye, *((eye,) if self.reads_old else ()))

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The root of each matrix, regardless of its round."""
        if self.trace_scaling is not None:
            A = _trace_scaled(A, self.trace_scaling, self.epsilon)
        p = 1 / self.exponent
        basis: tuple[Tensor, ...] = ()
        if self.basis_tolerance is None:
            found = self.solver(A, p, self.epsilon)
        else:
            assert isinstance(self.solver, EigenSolver)
            found, Q = self.solver.near_basis(A, p, self.epsilon, old[1], self.basis_tolerance)
            basis = (Q,)
        X, residual, condition, converged = found
        return Found((on_support(X, A), *basis), residual, condition, converged)


def _trace_scaled(A: Tensor, exponent: Hyper, epsilon: Hyper) -> Tensor:
    """A max(tr A, epsilon)^(-exponent); A itself if that is zero, which has no derivative."""
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = epsilon.to(trace) if isinstance(epsilon, Tensor) else epsilon
    size = trace.clamp(min=floor)
    scale = power(torch.where(size > 0, size, 1.0), -exponent)
    return A * cast(scale, A.dtype)[..., None, None]


def root_rules(
    exponents: Exponents | None,
    sides: Sides | None,
    initial_eigenvalue: float,
    numbers: Iterable[Any],
    hyper: Numbers,
) -> Callable[[Block], list[Rule | None]]:
    """The rules for a block of a given shape; None for a side that is left alone.

    Args:
        exponents, sides, initial_eigenvalue: as in `root_inverse`.
        numbers: the last fields of a `RootRule`, as given. A refresh looks them up in `hyper`, once
            for all blocks, which share batches.
    """
    now: list[Any] = []

    def rules(block: Block) -> list[Rule | None]:
        now.extend([number(resolved(x, hyper), hyper) for x in (() if now else numbers)])
        powers = zip(block, side_exponents(block, exponents, sides))
        return [RootRule(d, e, initial_eigenvalue**-e, *now) if e else None for d, e in powers]

    return rules
