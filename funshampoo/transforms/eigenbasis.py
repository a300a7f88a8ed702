"""Elementwise methods in eigenbases of the factors: SOAP, eigenvalue-corrected Shampoo."""

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
from funshampoo.core.traits import IN_BASES, OF_SIDES, refuse, with_traits, without
from funshampoo.linalg.choice import chosen_basis
from funshampoo.linalg.solver import relative_cost
from funshampoo.operators.columns import zeros_a_block
from funshampoo.refresh import Refreshing, RefreshSchedule
from funshampoo.refresh.bases import BasisRule, renewed
from funshampoo.refresh.coordinates import coordinate_flops, one_more, stepped, with_bases
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.partners import check_nearest, statistics_of


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
    """Run `inner` in the eigenbases of the factor matrices (SOAP), and rotate its updates back.

        R = U ×_1 Q_1ᵀ … ×_k Q_kᵀ,   updates = inner(R) ×_1 Q_1 … ×_k Q_k
        then, on a refresh:   Q_i ← the eigenvectors of L_i / weight

    With `scale_by_adam` as `inner` this is SOAP. L_i and weight come from the `KroneckerState`
    upstream. A step uses the bases from before it, so a block's first gradient only initializes
    them: the block does not move, and `inner` does not see that gradient. Both are options. First
    moments and momentum of `inner` are rotated from the old bases to the new; second moments stay,
    column by column. Blocks get bases on refreshes only: one whose first gradient comes between
    two, or was not finite on a refresh, takes its next steps in the identity.

    Args:
        inner: elementwise stages, or chains of them. They see a rotated `gradient`, too. Mark a
            field of your own state that is linear in the updates, and so has to be rotated, with
            `funshampoo.state.meaning(field="linear")`.
        every, start, stagger: as in `root_inverse`.
        offset: refreshes after the first fall on steps t with (t - offset) divisible by `every`.
        basis: `linalg.qr()`, the default: one step of power iteration; `linalg.eigh()`, with
            columns matched to the old; or `linalg.by_rank()`, with columns ordered by eigenvalue.
        first: for a block's first gradient: "skip" as above; "identity": a step like all others,
            since the bases start as the identity, as in SPlus.
        renew_before_use: refresh before the step, which then uses the new bases, as in
            eigenvalue-corrected Shampoo. With start=1 and first="identity" no step uses the
            identity.

    A side without a factor matrix (`kronecker_statistics(exponents=..., sides=...)`) is not
    rotated. In float32, a row that had gradients but got zeros for 30 / (1 - beta2) steps moves by
    other rows' rounding, as far as `inner` amplifies small coordinates: epsilon prevents it.

    Derivatives through training, also second ones, include the bases; for ties see
    `linalg.spectral.Spectrum`. After few gradients L_i has a null space; if that has two or more
    dimensions, rounding chooses its basis. What signs or Adam make of new gradients in it, and all
    that follows, differs between vmap and a loop, and jumps between two learning rates (seen in
    LoRA's first steps, on matrices that start as zeros). No derivative shows this.

    State: `EigenbasisState`.

    Raises:
        ValueError: an argument out of range; from init and update, no `KroneckerState` upstream.
            A stage in it reads parameters, or has statistics, roots, bases or blocks of its own.
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
    _check_inside(inner)
    schedule = RefreshSchedule(every, start, stagger, offset)
    check_choice("first", first, ("skip", "identity"))
    check_flag("renew_before_use", renew_before_use)
    renew = chosen_basis(basis)

    def refreshing(new: bool, live: Numbers = NO_NUMBERS) -> Refreshing:
        return Refreshing(lambda b: [BasisRule(d, resolved(renew, live), new) for d in b], schedule)

    def init(params: Tree, **context: Any) -> EigenbasisState:
        check_local(params, "in_eigenbasis")
        upstream = context.get("upstream", ())
        factors = statistics_of(upstream, "in_eigenbasis", params).factors
        check_nearest(upstream, "in_eigenbasis")
        ndim = context.get("block_ndim", 0)
        # Only for sides with a factor: an identity of side 50,000 would take 10 GB.
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
            if context.donate and context.clock is not None:  # a refresh advances it
                context = changed(context, clock=context.clock.clone())
            own, bases = renewed(anew, updates, own, bases, context, "in_eigenbasis")
        out, own = stepped(inner, updates, own, params, bases.kept, fine, context)
        if not renew_before_use:
            own, bases = renewed(anew, updates, own, bases, context, "in_eigenbasis")
        return out, EigenbasisState(own, seen, bases)

    def phase(step: int) -> Phase:
        begins = ("first bases",) if step == start else ()  # computed by another method
        return (*schedule.phase()(step), *begins, *inner.phase(step))

    stage = GradientTransformation(
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
    stage.traits = without(stage.traits, IN_BASES)
    return with_traits(stage, OF_SIDES)


def _check_inside(inner: GradientTransformation) -> None:
    """Raise ValueError for what belongs to the parameters' own coordinates."""
    apart = "there, coordinates are others after every refresh: put it outside of in_eigenbasis."
    refuse(inner, "in_eigenbasis", of_sides=apart)
    if inner.needs:
        raise ValueError(
            f"in_eigenbasis(...) with {inner.needs}(...) in it: it reads parameters, which are not "
            "turned into the bases: put it behind in_eigenbasis(...)."
        )
