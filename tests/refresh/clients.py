"""Two stages on `Refreshing`, as somebody outside the package would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.core.context import changed
from funshampoo.core.tree import compute_dtype, map_leaves, update_leaves
from funshampoo.linalg import eigh
from funshampoo.linalg.products import each_matrix, matmul
from funshampoo.operators.mode_products import bias_corrected, precondition, rotate, unfold
from funshampoo.refresh import Found, Refreshing, RefreshSchedule, Rule
from funshampoo.state import RefreshedState
from funshampoo.transforms import statistics_of


@dataclass(frozen=True)
class Basis(Rule):
    """Eigenvectors of A as columns: by eigh the first time, then a step of power iteration each.

    The columns stay in their places: they are sorted for the QR alone, which treats the first as
    the one to keep.
    """

    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        return (torch.eye(self.side, dtype=like.dtype, device=like.device).expand(like.shape),)

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        (Q,), first = old, (rounds == 0)[..., None, None]
        turned = matmul(Q.mT, matmul(A, Q))
        order = turned.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)[..., None, :]
        new = each_matrix(torch.linalg.qr, matmul(A, Q.take_along_dim(order, -1)))[0]
        new = new.take_along_dim(order.argsort(-1), -1)
        new = torch.where(first, each_matrix(torch.linalg.eigh, A)[1].flip(-1), new)
        unknown = torch.full_like(A[..., 0, 0], -1)
        return Found((new,), unknown, unknown, new.isfinite().all(-1).all(-1))


class InEigenbasisState(NamedTuple):
    inner: Any
    bases: RefreshedState


def _corrected(side: int, factors: Any, weight: Tensor) -> Any:
    return bias_corrected, factors[side], weight


def in_eigenbasis(inner: Any, every: int = 10, **schedule: Any) -> fs.GradientTransformation:
    """SOAP (Vyas et al., arXiv 2409.11321): `inner` in the eigenbases of the factor matrices."""
    bases = Refreshing(lambda block: [Basis(d) for d in block], RefreshSchedule(every, **schedule))

    def init(params, *, block_ndim=0, clock=False, **context):
        inside = {**context, "block_ndim": block_ndim, "clock": clock}
        return InEigenbasisState(
            inner.init(params, **inside), bases.init(params, block_ndim, clock)
        )

    def update(updates, state, params, context):
        statistics = statistics_of(context.upstream, "in_eigenbasis", updates)
        new = bases.update(updates, state.bases, statistics, _corrected, context)

        def turned(tree, back=False):
            def leaf(u, units):
                Q = [unit.value[0] for unit in units]
                return (rotate(u, Q, context.block_ndim, back),)

            return update_leaves(leaf, tree, (), (new.kept,))[0]

        gradient = turned(updates if context.gradient is None else context.gradient)
        inside = changed(context, gradient=gradient)
        out, own = inner.run(turned(updates), state.inner, params, inside)
        return turned(out, back=True), InEigenbasisState(own, new)

    phase = bases.schedule.phase()
    return fs.GradientTransformation(init, update, phase=phase, parts={"inner": inner}, counts=True)


@dataclass(frozen=True)
class Root(Basis):
    """A^(-1/2), damped."""

    symmetric = (0,)
    reads_old = False
    threaded = True

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        X, *rest = eigh(relative_epsilon=1e-6)(A, 2, 0.0)
        return Found((X,), *rest)


class KlShampooState(NamedTuple):
    factors: Any
    weight: Any
    roots: RefreshedState


def kl_shampoo(beta: float, every: int = 10, **schedule: Any) -> fs.GradientTransformation:
    """KL-Shampoo (Lin et al., arXiv 2509.03378) by roots.

        L_i ← beta L_i + (1-beta) mat_i(G_i) mat_i(G_i)ᵀ d_i / |G|,   X_i = L_i^(-1/2)

    G_i is G preconditioned by the roots of all other sides, as they were before this step.
    """
    roots = Refreshing(lambda block: [Root(d) for d in block], RefreshSchedule(every, **schedule))

    def init(params, *, block_ndim=0, clock=False):
        def zeros(p, *sides):
            return p.new_zeros((*p.shape[:block_ndim], *sides), dtype=compute_dtype(p))

        def factors(p):
            return tuple(zeros(p, d, d) for d in p.shape[block_ndim:])

        weight = map_leaves(zeros, params)
        kept = roots.init(params, block_ndim, clock)
        return KlShampooState(map_leaves(factors, params), weight, kept)

    def update(updates, state, params, context):
        n = context.block_ndim
        alive = context.alive or map_leaves(torch.ones_like, state.weight)

        def accumulated(u, units, fine, factors, weight):
            X, new = [unit.value[0] for unit in units], []
            for i, L in enumerate(factors):
                others = [None if j == i else x for j, x in enumerate(X)]
                g = unfold(precondition(u.to(L.dtype), others, n), i, n)
                new.append(torch.lerp(L, matmul(g, g.mT) / g.shape[-1], 1 - beta))
            return u, tuple(new), torch.lerp(weight, fine, 1 - beta)

        before = (state.factors, state.weight)
        inputs = (state.roots.kept, alive)
        _, *statistics = update_leaves(accumulated, updates, before, inputs)
        new = roots.update(updates, state.roots, statistics, _corrected, context)

        def direction(u, units):
            return (precondition(u.to(compute_dtype(u)), [unit.value[0] for unit in units], n),)

        out = update_leaves(direction, updates, (), (new.kept,))[0]
        return out, KlShampooState(*statistics, new)

    phase = roots.schedule.phase(threads=True)
    return fs.GradientTransformation(init, update, phase=phase, counts=True)
