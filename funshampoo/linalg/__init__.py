"""Inverse p-th roots of stacks of symmetric matrices: pure batched functions, usable alone."""

from __future__ import annotations

from funshampoo.linalg.basis import Basis, by_rank, qr
from funshampoo.linalg.by_device import by_device
from funshampoo.linalg.coupled_higher_order import coupled_higher_order
from funshampoo.linalg.coupled_newton import coupled_newton
from funshampoo.linalg.eigh import eigh
from funshampoo.linalg.newton_schulz import newton_schulz
from funshampoo.linalg.orthogonal_iteration import orthogonal_iteration
from funshampoo.linalg.pseudo_inverse import pseudo_inverse
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
