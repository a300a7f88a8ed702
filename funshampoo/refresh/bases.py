"""Eigenbases as periodically refreshed values, and the state carried from old to new bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.context import Context
from funshampoo.core.contract import Tree
from funshampoo.core.tree import map_leaves
from funshampoo.linalg.basis import Basis
from funshampoo.linalg.solver import relative_cost
from funshampoo.operators.turning import carried
from funshampoo.refresh.factors import refreshed
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, Rule
from funshampoo.state.stages import RefreshedState


@dataclass(frozen=True)
class BasisRule(Rule):
    """The eigenvectors of A as columns. The value is Q (..., d, d), initially the identity.

    Attributes:
        basis: as in `in_eigenbasis`.
        begins: whether every value is its block's first.
    """

    basis: Basis
    begins: bool

    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """The identity."""
        return (torch.eye(self.side, dtype=like.dtype, device=like.device).expand(like.shape),)

    @property
    def relative_cost(self) -> float:
        """The basis's relative cost."""
        return relative_cost(self.basis)

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The next basis, by a decomposition if there is none yet.

        A coordinate without any gradient so far (its row of A is exactly zero: padding, frozen
        tokens) is in none of its vectors, so that rounding can't move it.
        """
        Q, found = self.basis(A, old[0], rounds == 0, self.begins)
        Q = Q * (A.diagonal(dim1=-2, dim2=-1) != 0)[..., None]
        unknown = torch.full_like(A[..., 0, 0], -1)
        return Found((Q,), unknown, unknown, found)


def renewed(
    refreshing: Refreshing,
    updates: Tree,
    own: Any,
    bases: RefreshedState,
    context: Context,
    stage: str,
) -> tuple[Any, RefreshedState]:
    """The state that lives in the bases, rotated into the new ones, and these bases."""
    kept, renews = bases.kept, refreshing.schedule.renews(context)
    if renews and context.donate:  # a refresh writes to its input
        kept = map_leaves(torch.clone, kept)
    bases = refreshed(refreshing, updates, bases, context, stage)
    if renews:
        own = carried(own, updates, kept, bases.kept, context.block_ndim)
    return own, bases
