"""Inverse p-th roots of stacks of symmetric positive semidefinite matrices: pure batched functions, usable alone."""

from __future__ import annotations

from .coupled_newton import coupled_newton
from .eigh import eigh
from .newton_schulz import newton_schulz
from .pseudo_inverse import pseudo_inverse
from .solver import InverseRoot, Solver

__all__ = [
    "InverseRoot",
    "Solver",
    "coupled_newton",
    "eigh",
    "newton_schulz",
    "pseudo_inverse",
]
