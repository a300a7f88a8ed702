"""Another method in the eigenbases of the factor matrices: SOAP, eigenvalue-corrected Shampoo."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from funshampoo.core.clock import running
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.modes import full_precision
from funshampoo.core.tree import check_local, map_leaves
from funshampoo.linalg.basis import Decomposition, qr
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.operators.columns import weights_over
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Rule
from funshampoo.refresh.turns import RefreshSchedule
from funshampoo.state.stages import RefreshedState
from funshampoo.state.upstream import statistics_of


class EigenbasisState(NamedTuple):
    """State of `in_eigenbasis`.

    Attributes:
        inner: of the transformation that works in the bases.
        seen: a tree of (N,) int64, or (): how many gradients each block has had.
        bases: `RefreshedState` whose values are Q_i (N, d_i, d_i), eigenvectors as columns.
    """

    inner: Any
    seen: Tree
    bases: RefreshedState


def in_eigenbasis(
    inner: GradientTransformation,
    every: int = 10,
    *,
    start: int = 1,
    offset: int = 0,
    basis: Any = None,
    stagger: bool = False,
) -> GradientTransformation:
    """Run `inner` on the coordinates in the eigenbases of the factor matrices, and turn back.

        R = U ×_1 Q_1ᵀ … ×_k Q_kᵀ,   updates = inner(R) ×_1 Q_1 … ×_k Q_k
        then, on a refresh:   Q_i ← the eigenvectors of L_i / weight

    With `scale_by_adam` in it this is SOAP. L_i and weight come from the `KroneckerState` upstream.
    The step is made in the bases from before it, so a block's first gradient only gives it bases:
    it is not moved, and `inner` does not see it. What `inner` averages (first moments, momentum) is
    turned from the old bases into the new; second moments stay, column by column.

    Args:
        inner: elementwise stages, or chains of them. `gradient` is turned for them too. A field of
            a state of your own that is linear in the updates, and so has to be turned, says so by
            `funshampoo.state.meaning(field="linear")`.
        every, start, stagger: as in `root_inverse`.
        offset: refreshes after the first fall on steps t with (t - offset) divisible by `every`.
        basis: `linalg.qr()`, the default: one step of power iteration; or `linalg.eigh()`.

    A side without a factor matrix (`kronecker_statistics(exponents=..., sides=...)`) is not turned.

    State: `EigenbasisState`.

    Raises:
        ValueError: an argument out of range; from init and update, no `KroneckerState` upstream.
        TypeError: basis is neither.

    Reference: Vyas et al., arXiv 2409.11321 (SOAP); George et al., arXiv 1806.03884.

    >>> import torch
    >>> from funshampoo import chain, kronecker_statistics, scale_by_adam
    >>> tx = chain(kronecker_statistics(0.9), in_eigenbasis(scale_by_adam(0.9, 0.9)))
    >>> params, g = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
    >>> updates, state = tx.update(g, tx.init(params))
    >>> updates
    {'w': tensor([0., 0.])}
    >>> tx.update(g, state)[0]  # g / |g|: the sign of its one coordinate
    {'w': tensor([0.6000, 0.8000])}
    """
    inner = as_transformation(inner)
    if isinstance(basis, EigenSolver):
        basis = Decomposition()
    elif basis is None:
        basis = qr()
    elif not isinstance(basis, type(qr())):
        raise TypeError(f"basis is {basis!r}; give linalg.qr() or linalg.eigh().")
    schedule = RefreshSchedule(every, start, stagger, offset)

    def kept_for(kept_sides: Tree) -> Refreshing:
        """A unit for every side that has a factor matrix."""

        def rules(block: tuple[int, ...]) -> list[Rule | None]:
            return [BasisRule(d, basis) for d in block]

        return Refreshing(rules, schedule)

    refreshing = kept_for(None)

    def init(
        params: Tree,
        *,
        upstream: Any = None,
        block_ndim: int = 0,
        clock: bool = False,
        **context: Any,
    ) -> EigenbasisState:
        check_local(params, "in_eigenbasis")
        statistics = statistics_of(upstream or (), "in_eigenbasis", params)
        inside = {**context, "upstream": upstream, "block_ndim": block_ndim, "clock": clock}
        bases = refreshing.init(params, block_ndim, clock)
        bases = bases._replace(kept=_with_factors(bases.kept, statistics.factors, params))
        seen = map_leaves(lambda p: p.new_zeros(p.shape[:block_ndim], dtype=torch.int64), params)
        return EigenbasisState(inner.init(params, **inside), seen, bases)

    def update(
        updates: Tree, state: EigenbasisState, params: Tree, context: Context
    ) -> tuple[Tree, EigenbasisState]:
        context = running(state.bases.steps, context)
        statistics = statistics_of(context.upstream, "in_eigenbasis", updates)
        turn = functools.partial(_turned, block_ndim=context.block_ndim)
        fine = _with_bases(updates, state.seen, context.alive)
        with full_precision():
            gradient = updates if context.gradient is None else context.gradient
            turned = turn(updates, state.bases.kept)
            if context.gradient is not None and context.gradient is not updates:
                gradient = turn(gradient, state.bases.kept)
            else:
                gradient = turned
        inside = changed(context, gradient=gradient, alive=fine)
        out, own = inner.run(turned, state.inner, params, inside)
        with full_precision():
            out = turn(_held(out, fine), state.bases.kept, back=True)
        refreshes = (
            schedule.happens_at(context.step) if context.refresh is None else context.refresh
        )
        old = map_leaves(torch.clone, state.bases.kept) if refreshes and context.donate else None
        weight = weights_over(statistics.weight, updates)
        bases = refreshing.update(
            updates, state.bases, (statistics.factors, weight), _factor, context
        )
        if refreshes:
            before = state.bases.kept if old is None else old
            own = _carried(own, before, bases.kept, context.block_ndim)
        return out, EigenbasisState(own, _counted(updates, state.seen, context), bases)

    return GradientTransformation(
        init,
        update,
        phase=schedule.phase(),
        parts={"inner": inner},
        counts=True,
        minds_alive=inner.minds_alive,
    )
