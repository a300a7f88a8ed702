"""Another method in the eigenbases of the factor matrices: SOAP, eigenvalue-corrected Shampoo."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from funshampoo.core.checks import check_choice, check_flag
from funshampoo.core.clock import running
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Phase, Tree, as_transformation
from funshampoo.core.live import NO_NUMBERS, Numbers, resolved
from funshampoo.core.parameters import check_local
from funshampoo.linalg.choice import chosen_basis
from funshampoo.linalg.solver import relative_cost
from funshampoo.operators.columns import zeros_a_block
from funshampoo.refresh import Refreshing, RefreshSchedule
from funshampoo.refresh.bases import BasisRule, renewed
from funshampoo.refresh.coordinates import coordinate_flops, one_more, stepped, with_bases
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.upstream import statistics_of


def in_eigenbasis(
    inner: GradientTransformation,
    every: int = 10,
    *,
    start: int = 1,
    offset: int = 0,
    basis: Any = None,
    stagger: bool = False,
    first: Literal["skip", "identity"] = "skip",
    renew_before_use: bool = False,
) -> GradientTransformation:
    """Run `inner` on the coordinates in the eigenbases of the factor matrices, and turn back.

        R = U ×_1 Q_1ᵀ … ×_k Q_kᵀ,   updates = inner(R) ×_1 Q_1 … ×_k Q_k
        then, on a refresh:   Q_i ← the eigenvectors of L_i / weight

    With `scale_by_adam` in it this is SOAP. L_i and weight come from the `KroneckerState` upstream.
    The step is made in the bases from before it, so a block's first gradient only gives it bases:
    it is not moved, and `inner` does not see it. Both are options. What `inner` averages (first
    moments, momentum) is turned from the old bases into the new; second moments stay, column by
    column. Between two refreshes nobody gets bases: a block whose first gradient comes there, or
    was not finite on a refresh, makes its next steps in the identity.

    Args:
        inner: elementwise stages, or chains of them. `gradient` is turned for them too. A field of
            a state of your own that is linear in the updates, and so has to be turned, says so by
            `funshampoo.state.meaning(field="linear")`.
        every, start, stagger: as in `root_inverse`.
        offset: refreshes after the first fall on steps t with (t - offset) divisible by `every`.
        basis: `linalg.qr()`, the default: one step of power iteration; `linalg.eigh()`, whose
            columns continue one another; or `linalg.by_rank()`, with columns by their eigenvalues.
        first: of a block's first gradient: "skip" as above; "identity": a step like all others,
            since the bases begin as the identity, as in SPlus.
        renew_before_use: a refresh comes before the step, which is made in the new bases, as in
            eigenvalue-corrected Shampoo. With start=1 and first="identity" no step is made in the
            identity.

    A side without a factor matrix (`kronecker_statistics(exponents=..., sides=...)`) is not turned.
    In float32 a row that had gradients and has got zeros for 30 / (1 - beta2) steps is moved by the
    rounding of others, as far as `inner` takes small coordinates for large ones: epsilon is for it.

    Derivatives through training, second ones too, take the bases with them; see
    `linalg.spectral.Spectrum` for ties. Of few gradients L_i has a null space, whose basis is
    rounding's choice if it has two dimensions or more: what is made of new gradients in it by signs
    or Adam, and so what follows, differs between vmap and a loop, and jumps between two rates (see
    it in LoRA's first steps, of matrices that begin as zeros), of which no derivative tells.

    State: `EigenbasisState`.

    Raises:
        ValueError: an argument out of range; from init and update, no `KroneckerState` upstream.
        TypeError: basis is none of these.

    Reference: Vyas et al., arXiv 2409.11321 (SOAP); George et al., arXiv 1806.03884.

    >>> import torch
    >>> from funshampoo import chain, kronecker_statistics, scale_by_adam
    >>> tx = chain(kronecker_statistics(0.9), in_eigenbasis(scale_by_adam(0.9, 0.9)))
    >>> g = {"w": torch.diag(torch.tensor([3.0, -2.0]))}
    >>> updates, state = tx.update(g, tx.init(g))
    >>> updates["w"].any()
    tensor(False)
    >>> tx.update(g, state)[0]["w"]
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    inner = as_transformation(inner)
    schedule = RefreshSchedule(every, start, stagger, offset)
    check_choice("first", first, ("skip", "identity"))
    check_flag("renew_before_use", renew_before_use)
    renew = chosen_basis(basis)

    def refreshing(new: bool, live: Numbers = NO_NUMBERS) -> Refreshing:
        return Refreshing(lambda b: [BasisRule(d, resolved(renew, live), new) for d in b], schedule)

    def init(params: Tree, **context: Any) -> EigenbasisState:
        check_local(params, "in_eigenbasis")
        factors = statistics_of(context.get("upstream", ()), "in_eigenbasis", params).factors
        ndim = context.get("block_ndim", 0)
        # Only of sides that have a factor: the identity of one of 50,000 would be 10 GB.
        bases = refreshing(True).init(params, ndim, context.get("clock", False), factors)
        seen = zeros_a_block(params, ndim, torch.int64) if first == "skip" else ()
        return EigenbasisState(inner.init(params, **context), seen, bases)

    def update(
        updates: Tree, state: EigenbasisState, params: Tree, context: Context
    ) -> tuple[Tree, EigenbasisState]:
        context = running(state.bases.steps, context)
        (own, seen, bases), fine = state, context.alive
        anew = refreshing(context.step == start, context.hyper)
        if first == "skip":
            fine = with_bases(updates, seen, fine)
            seen = one_more(updates, seen, context)
        if renew_before_use:
            if context.donate and context.clock is not None:  # which a refresh moves on
                context = changed(context, clock=context.clock.clone())
            own, bases = renewed(anew, updates, own, bases, context, "in_eigenbasis")
        out, own = stepped(inner, updates, own, params, bases.kept, fine, context)
        if not renew_before_use:
            own, bases = renewed(anew, updates, own, bases, context, "in_eigenbasis")
        return out, EigenbasisState(own, seen, bases)

    def phase(step: int) -> Phase:
        begins = ("first bases",) if step == start else ()  # found in another way
        return (*schedule.phase()(step), *begins, *inner.phase(step))

    return GradientTransformation(
        init,
        update,
        phase=phase,
        parts={"inner": inner},
        counts=True,
        minds_alive=True,
        numbers=[renew],
        flops=functools.partial(coordinate_flops, inner.reads_gradient),
        refresh_cost=relative_cost(renew),
    )
