"""Which solver or basis a stage uses, and whether it can."""

from __future__ import annotations

from typing import Any

from funshampoo.core.checks import check_range
from funshampoo.core.contract import Hyper
from funshampoo.linalg.basis import Basis, Decomposition, qr
from funshampoo.linalg.by_device import by_device
from funshampoo.linalg.eigensolver import EigenSolver, eigh
from funshampoo.linalg.solver import RootSolver, Solver


def default_solver(relative_epsilon: Hyper, basis_tolerance: Hyper | None = None) -> Solver:
    """The default solver for this damping; with a tolerance, one that has a basis."""
    make = by_device if basis_tolerance is None else eigh
    return make(relative_epsilon=relative_epsilon)


def chosen_solver(solver: Solver | None, basis_tolerance: Hyper | None) -> Solver:
    """The given solver, or else the default one.

    Raises:
        TypeError: not a solver.
        ValueError: it has no basis, which basis_tolerance needs, or that is out of range.
    """
    solve: Any = default_solver(1e-6, basis_tolerance) if solver is None else solver
    if not callable(solve):
        raise TypeError(f"solver is {solve!r}; give one of funshampoo.linalg, as linalg.eigh().")
    if isinstance(solve, type) and issubclass(solve, RootSolver):
        raise TypeError("solver makes solvers and is none: call it, as in linalg.eigh().")
    if basis_tolerance is not None:
        check_range("basis_tolerance", basis_tolerance, 0.0, infinite=True)
        if not isinstance(solve, EigenSolver):
            raise ValueError(
                "basis_tolerance needs a solver that works in an eigenbasis: give linalg.eigh() or "
                "linalg.pseudo_inverse(), or leave basis_tolerance out."
            )
    return solve  # type: ignore[no-any-return]


def chosen_basis(basis: Any) -> Basis:
    """The given basis, or else the default one.

    Raises:
        TypeError: not a basis.
    """
    if basis is None:
        return qr()
    if isinstance(basis, EigenSolver):
        return Decomposition()
    if isinstance(basis, Basis):
        return basis
    raise TypeError(f"basis is {basis!r}; give linalg.qr(), linalg.eigh() or linalg.by_rank().")
