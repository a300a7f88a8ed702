"""The named tuples of stages that work in the eigenbases of factor matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

from funshampoo.state.meaning import meaning
from funshampoo.state.stages import KroneckerState, RefreshedState, Tree


@meaning(seen="count", bases="orthonormal")
class EigenbasisState(NamedTuple):
    """State of `in_eigenbasis`.

    Attributes:
        inner: the state of the transformation that works in the bases.
        seen: a tree of (N,) int64: how many gradients each block has had; () if nothing depends on
            it, that is, for first="identity".
        bases: `RefreshedState` whose values are Q_i (N, d_i, d_i), eigenvectors as columns.
    """

    inner: Any
    seen: Tree
    bases: RefreshedState


@meaning(eigenvalues="nonnegative")
class KlState(NamedTuple):
    """State of `kl_statistics`.

    Attributes:
        statistics: L_i and their weights, where `root_inverse` and `in_eigenbasis` look for them.
        eigenvalues: tree of tuples, one λ_i (N, d_i) per side; empty tuples unless averaged.
    """

    statistics: KroneckerState
    eigenvalues: Tree
