"""Root solvers: time against error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.timing import repeated
from funshampoo import linalg
from funshampoo.linalg import InverseRoot, Solver

STACKS = ((32, 128), (8, 256), (4, 512), (1, 1024))
SMALL_STACKS = ((8, 64), (2, 128))
CONDITION = 1e6
EPSILON = 1e-6
POWER = 4

ABOUT = """A^(-1/4) of stacks of matrices of condition 1e6, eigenvalues evenly spaced in their
logarithms and eigenvectors in general position, float32, damped by 1e-6 of the largest eigenvalue.
Error: of the preconditioned gradient X G against float64, relative, where G = A^(1/2) Z is a
gradient whose statistics are A. The pseudo-inverse has no damping: it cuts off at 1e-7 of the
largest eigenvalue, below all of them, and its error is against A^(-1/4). Solvers took turns."""


def section(settings: Settings) -> Section:
    """A cell for every stack."""
    columns = [
        Column("stack", "stack"),
        Column("solver", "solver"),
        Column("time", "ms", "ms"),
        Column("error", "error", "error"),
        Column("converged", "converged", "share"),
    ]
    stacks = SMALL_STACKS if settings.quick else STACKS
    cells = [Cell(f"{n} of {d}×{d}", _cell(n, d, settings)) for n, d in stacks]
    return Section("roots", "Root solvers", ABOUT, columns, cells)


def solvers() -> dict[str, Solver]:
    """By the names in the table."""
    return {
        "eigh": linalg.eigh(relative_epsilon=EPSILON),
        "eigh in float64": in_float64(linalg.eigh(relative_epsilon=EPSILON)),
        "pseudo_inverse": linalg.pseudo_inverse(rtol=EPSILON / 10),
        "coupled_newton": linalg.coupled_newton(relative_epsilon=EPSILON),
        "newton_schulz": linalg.newton_schulz(relative_epsilon=EPSILON, condition=CONDITION),
    }


def in_float64(solver: Solver) -> Solver:
    """The same on a copy in float64; a float32 root."""

    def solve(A: Tensor, p: float, epsilon: float | Tensor = 0.0) -> InverseRoot:
        found = solver(A.double(), p, epsilon)
        return found._replace(root=found.root.to(A.dtype))

    return solve


def _cell(count: int, side: int, settings: Settings) -> Callable[[], Rows]:
    def run() -> Rows:
        make = torch.Generator().manual_seed(0)
        Q, _ = torch.linalg.qr(torch.randn(count, side, side, generator=make).double())
        spectrum = torch.logspace(0, -torch.tensor(CONDITION).log10().item(), side).double()
        Z = torch.randn(count, side, side, generator=make).double()
        G = _power(Q, spectrum, 0.5) @ Z
        A = _power(Q, spectrum, 1.0).float().to(settings.device)
        named = solvers()
        spread = repeated(
            {name: lambda s=solver: s(A, POWER, 0.0) for name, solver in named.items()},
            settings.device,
            0.2 if settings.quick else 4.0,
            3 if settings.quick else 5,
        )
        rows: Rows = []
        for name, solver in named.items():
            found = solver(A, POWER, 0.0)
            damping = 0.0 if name == "pseudo_inverse" else EPSILON * spectrum.max()
            wanted = _power(Q, spectrum + damping, -1 / POWER) @ G
            error = (found.root.cpu().double() @ G - wanted).norm() / wanted.norm()
            rows.append(
                {
                    "stack": f"{count} of {side}×{side}",
                    "solver": name,
                    "time": spread[name].in_ms,
                    "error": float(error),
                    "converged": float(found.converged.double().mean()),
                }
            )
        return rows

    return run


def _power(Q: Tensor, spectrum: Tensor, exponent: float) -> Tensor:
    """Q diag(spectrum^exponent) Qᵀ."""
    return (Q * spectrum**exponent) @ Q.mT
