"""Another method in the eigenbases of the factor matrices: SOAP, eigenvalue-corrected Shampoo."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from funshampoo.combinators.guard import run_alive
from funshampoo.core.checks import check_choice, check_flag
from funshampoo.core.clock import running
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Phase, Tree, as_transformation
from funshampoo.core.live import NO_NUMBERS, Numbers, resolved
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import (
    compute_dtype,
    flatten,
    is_one,
    map_leaves,
    update_columns,
    update_leaves,
)
from funshampoo.linalg.basis import Basis, Decomposition, qr
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.norms import is_readable
from funshampoo.linalg.solver import relative_cost
from funshampoo.operators.columns import Column, add, only_alive, zeros_a_block
from funshampoo.operators.mode_products import bias_corrected, mode_flops
from funshampoo.operators.turning import carried, turned
from funshampoo.refresh.jobs import Reading
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, Rule
from funshampoo.refresh.turns import RefreshSchedule
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.stages import RefreshedState
from funshampoo.state.upstream import statistics_of
from funshampoo.transforms.kronecker import factors_and_weights


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
    renew = _basis_of(basis)

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

    def renewed(
        updates: Tree, own: Any, bases: RefreshedState, context: Context
    ) -> tuple[Any, RefreshedState]:
        inputs = factors_and_weights(updates, context, "in_eigenbasis")
        kept, renews = bases.kept, schedule.renews(context)
        if renews and context.donate:  # a refresh writes to what it is given
            kept = map_leaves(torch.clone, kept)
        begins = context.step == start
        bases = refreshing(begins, context.hyper).update(updates, bases, inputs, _factor, context)
        if renews:
            own = carried(own, updates, kept, bases.kept, context.block_ndim)
        return own, bases

    def update(
        updates: Tree, state: EigenbasisState, params: Tree, context: Context
    ) -> tuple[Tree, EigenbasisState]:
        context = running(state.bases.steps, context)
        own, bases, seen, fine = state.inner, state.bases, state.seen, context.alive
        if first == "skip":
            fine = _with_bases(updates, seen, fine)
            seen = _counted(updates, seen, context)
        if renew_before_use:
            if context.donate and context.clock is not None:  # which a refresh moves on
                context = changed(context, clock=context.clock.clone())
            own, bases = renewed(updates, own, bases, context)
        out, own = _stepped(inner, updates, own, params, bases.kept, fine, context)
        if not renew_before_use:
            own, bases = renewed(updates, own, bases, context)
        return out, EigenbasisState(own, seen, bases)

    return GradientTransformation(
        init,
        update,
        phase=functools.partial(_phase, schedule, inner),
        parts={"inner": inner},
        counts=True,
        minds_alive=True,
        numbers=[renew],
        flops=functools.partial(_flops, inner.reads_gradient),
        refresh_cost=relative_cost(renew),
    )


def _flops(
    reads_gradient: bool, block: tuple[int, ...], kept: tuple[int, ...], apart: bool
) -> float:
    """Into the bases and back, and into them with a `gradient` that is not the updates."""
    return (3 if apart and reads_gradient else 2) * mode_flops(block, kept)


def _phase(schedule: RefreshSchedule, inner: GradientTransformation, step: int) -> Phase:
    first = ("first bases",) if step == schedule.start else ()  # found in another way
    return (*schedule.phase()(step), *first, *inner.phase(step))


def _stepped(
    inner: GradientTransformation,
    updates: Tree,
    own: Any,
    params: Tree,
    kept: Tree,
    fine: Tree,
    context: Context,
) -> tuple[Tree, Any]:
    """A step of `inner` in these bases; zeros go in and come out where `fine` is 0."""
    ndim = context.block_ndim
    with product_precision():
        coordinates = gradient = _held(turned(updates, kept, ndim), fine)
        is_other = context.gradient is not None and not is_one(context.gradient, updates)
        if is_other and inner.reads_gradient:
            gradient = _held(turned(context.gradient, kept, ndim), fine)
    inside = changed(context, gradient=gradient, alive=fine, later=(), usable=False)
    out, own = run_alive(inner, coordinates, own, params, inside)
    with product_precision():
        return turned(_held(out, fine), kept, ndim, back=True), own


def _basis_of(basis: Any) -> Basis:
    if basis is None:
        return qr()
    if isinstance(basis, EigenSolver):
        return Decomposition()
    if isinstance(basis, Basis):
        return basis
    raise TypeError(f"basis is {basis!r}; give linalg.qr(), linalg.eigh() or linalg.by_rank().")


@dataclass(frozen=True)
class BasisRule(Rule):
    """The eigenvectors of A as columns. The value is Q (..., d, d); it begins as the identity.

    Attributes:
        basis: of `in_eigenbasis`.
        begins: whether all values are the first.
    """

    basis: Basis
    begins: bool

    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """The identity."""
        return (torch.eye(self.side, dtype=like.dtype, device=like.device).expand(like.shape),)

    @property
    def relative_cost(self) -> float:
        """As the basis says."""
        return relative_cost(self.basis)

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The next basis, by a decomposition where there is none yet.

        A coordinate that no gradient has touched (its row of A is exactly zero: padding, frozen
        tokens) is in none of its vectors, so that rounding can't move it.
        """
        Q, found = self.basis(A, old[0], rounds == 0, self.begins)
        Q = Q * (A.diagonal(dim1=-2, dim2=-1) != 0)[..., None]
        unknown = torch.full_like(A[..., 0, 0], -1)
        return Found((Q,), unknown, unknown, found)


def _factor(side: int, factors: Any, weight: Tensor) -> Reading:
    """L_side / weight."""
    return bias_corrected, factors[side], weight


def _with_bases(updates: Tree, seen: Tree, alive: Tree) -> Tree:
    """A tree of (N,): 0 where a block has no bases yet, or is not alive; None where all are 1."""
    known = () if alive is None else (alive,)

    def leaf(u: Tensor, n: Tensor, *fine: Tensor) -> tuple[Tensor]:
        has = (n > 0).to(compute_dtype(u))
        return (has * fine[0] if fine else has,)

    counts = [n for u, n in zip(flatten(updates)[0], flatten(seen)[0]) if u is not None]
    if is_readable(counts) and all([bool((n > 0).all()) for n in counts]):
        return alive
    return update_leaves(leaf, updates, (), (seen, *known))[0]


def _held(tree: Tree, fine: Tree) -> Tree:
    """Zeros where `fine` is 0."""
    if fine is None:
        return tree
    return update_columns(lambda u, f: (only_alive(u, [f]),), tree, (), (fine,))[0]


def _counted(updates: Tree, seen: Tree, context: Context) -> Tree:
    """One more, where the gradient could be used."""

    def more(u: Column, *rest: Column) -> tuple[Column, Column]:
        *fine, n = rest
        one = [x > 0 for x in fine[0]] if fine else [torch.ones_like(x) for x in n]
        return u, add(n, one, context.donate)

    known = () if context.alive is None else (context.alive,)
    return update_columns(more, updates, (seen,), known)[1]
