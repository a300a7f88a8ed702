"""Inverse p-th roots of stacks of symmetric matrices: pure batched functions, usable standalone."""

from __future__ import annotations

from funshampoo.linalg.basis import Basis, by_rank, orthogonal_iteration, qr
from funshampoo.linalg.by_device import by_device
from funshampoo.linalg.coupled_newton import coupled_higher_order, coupled_newton
from funshampoo.linalg.eigensolver import eigh, pseudo_inverse
from funshampoo.linalg.newton_schulz import newton_schulz
from funshampoo.linalg.solver import InverseRoot, RootSolver, Solver

__all__ = [
    "Basis",
    "InverseRoot",
    "RootSolver",
    "Solver",
    "by_device",
    "by_rank",
    "coupled_higher_order",
    "coupled_newton",
    "eigh",
    "newton_schulz",
    "orthogonal_iteration",
    "pseudo_inverse",
    "qr",
]
