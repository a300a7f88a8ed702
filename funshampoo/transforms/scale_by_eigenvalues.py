"""KL-Shampoo's scaling in its eigenbases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.adapting import without_state
from funshampoo.core.checks import check_range
from funshampoo.core.contract import EmptyState, GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.traits import IN_BASES, with_traits
from funshampoo.core.tree import flatten, update_leaves, wide
from funshampoo.operators.kl import inverse_root, outer
from funshampoo.operators.leaf_ops import multiply
from funshampoo.state.eigenbases import EigenbasisState, KlState
from funshampoo.state.nodes import find_state


def scale_by_eigenvalues(epsilon: Hyper = 1e-8) -> GradientTransformation:
    """KL-Shampoo's scaling: divide coordinates in the eigenbases by the roots of the eigenvalues.

        U ← U / (√(λ_1 ⊗ … ⊗ λ_k) + epsilon)

    For use in `in_eigenbasis`, after `kl_statistics`. It takes the λ_i from before this step, which
    belong to the bases that the step uses. Where one is 0 the update is 0.

    Args:
        epsilon: added to the root, ≥ 0.

    Raises:
        ValueError: epsilon out of range; from a chain, it is in no `in_eigenbasis`; from init, the
            nearest `kl_statistics` before has no eigenvalues, or they belong to another
            `in_eigenbasis` that stands between or in the direction of a `graft`.

    Reference: Lin et al., arXiv 2509.03378.

    >>> import torch
    >>> from funshampoo import chain, in_eigenbasis, kl_statistics
    >>> tx = chain(kl_statistics(initial_eigenvalue=4.0), in_eigenbasis(scale_by_eigenvalues()))
    >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
    >>> tx.update(w, tx.update(w, tx.init(w))[1])[0]["w"].round(decimals=3)  # √(4 · 4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    check_range("epsilon", epsilon, 0.0)

    def scaled(
        updates: Tree, *, earlier: tuple[Any, ...] = (), hyper: Numbers = NO_NUMBERS
    ) -> Tree:
        damping = number(epsilon, hyper)

        def leaf(u: Tensor, eigenvalues: Any) -> tuple[Tensor]:
            u = wide(u)
            h = outer([inverse_root(x) for x in eigenvalues]).reshape(u.shape)
            h = torch.clamp(h, max=torch.finfo(h.dtype).max)  # infinity times 0 would be NaN
            return (u * (h / (1 + multiply(h, damping, donate=False))),)

        eigenvalues = _eigenvalues(earlier, updates)
        return update_leaves(leaf, updates, (), (eigenvalues,))[0]

    def init(params: Tree, *, upstream: tuple[Any, ...] | None = None) -> EmptyState:
        if upstream is not None:
            _eigenvalues(upstream, params)
        return EmptyState()

    name = "scale_by_eigenvalues"
    stage = GradientTransformation(init, without_state(scaled), name, numbers=[epsilon])
    return with_traits(stage, IN_BASES)


def _eigenvalues(earlier: tuple[Any, ...], updates: Tree) -> Tree:
    """The λ_i in the bases of this `in_eigenbasis`.

    Raises:
        ValueError: the nearest statistics have none, or none in these bases.
    """
    found: Any = find_state(earlier, (KlState, EigenbasisState))
    needed = 'put kl_statistics(through="eigenvalues") before the in_eigenbasis(...) that it is in'
    if found is None:
        raise ValueError(f"scale_by_eigenvalues found no eigenvalues: {needed}.")
    if isinstance(found, EigenbasisState):
        raise ValueError(
            "scale_by_eigenvalues found no eigenvalues in its bases: another in_eigenbasis(...) "
            "comes before it, in the direction of a graft perhaps, which those of the "
            f"kl_statistics before both belong to; {needed}."
        )
    if any([len(x) == 0 for x in flatten(updates)[1].flatten_up_to(found.eigenvalues)]):
        raise ValueError(
            "scale_by_eigenvalues found no eigenvalues in the nearest kl_statistics before it, "
            f'whose through is "roots" or "ritz"; {needed}, with no other between.'
        )
    return found.eigenvalues
