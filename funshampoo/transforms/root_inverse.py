"""Inverse roots of the factor matrices, and the direction they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo import linalg
from funshampoo.base import GradientTransformation, Hyper, Tree
from funshampoo.checks import check_count, check_range
from funshampoo.linalg import InverseRoot, Solver, eigh
from funshampoo.linalg.products import matmul, power
from funshampoo.state.stages import FactorRoot, KroneckerState, RootInverseState, find_state
from funshampoo.steps import current_step, new_counter, refresh_due
from funshampoo.transforms.exponents import Exponents, check_exponents, inverse_exponents
from funshampoo.transforms.kronecker import bias_corrected
from funshampoo.transforms.turns import EVERYBODY, Turn, turns_at
from funshampoo.tree import check_parameters, compute_dtype, flatten, map_leaves, update_leaves

_FACTORIES: tuple[Any, ...] = (
    linalg.coupled_higher_order,
    linalg.coupled_newton,
    linalg.eigh,
    linalg.newton_schulz,
    linalg.pseudo_inverse,
)


def root_inverse(
    every: int = 10,
    *,
    start: int = 1,
    epsilon: Hyper = 0.0,
    solver: Solver | None = None,
    exponents: Exponents | None = None,
    trace_scaling: Hyper | None = None,
    initial_eigenvalue: float = 1.0,
    stagger: bool = False,
) -> GradientTransformation:
    """Precondition the updates with roots of the factor matrices, refreshed now and then.

        on a refresh:   X_i ← (L_i / weight + epsilon I)^(-e_i)
        on every step:  P = M ×_1 X_1 … ×_k X_k

    L_i and weight come from the `KroneckerState` upstream and include this step's gradient; M is
    what the chain has made of the gradient so far. Until its first refresh a block has X_i = I.

    A refresh keeps the old root of a matrix for which the solver fails, and counts it. It also
    keeps it where the statistics are still exactly zero: (0 + epsilon I)^(-e) would be an enormous
    multiple of the identity that the first real gradient would meet.

    Args:
        every: steps between refreshes.
        start: the step of the first refresh; later ones fall on multiples of `every`. Give `graft`
            the same, so that its step is the other method's until then.
        epsilon: absolute damping, ≥ 0 (number or tensor). Damping relative to the largest
            eigenvalue is the solver's: `eigh(relative_epsilon=...)`.
        solver: a function of `funshampoo.linalg`; by default eigh with relative_epsilon=1e-6. In
            float32 some damping relative to the largest eigenvalue, 1e-7 or more, is needed.
        exponents: {order: e, or {side: e}} in place of e = 1/(2 order); 0 leaves a side alone. Give
            `kronecker_statistics` the same, so that it spares the factor.
        trace_scaling: an exponent s in (0, 1]: take roots of A · max(tr A, epsilon)^(-s) instead of
            A = L_i / weight.
        initial_eigenvalue: before its first refresh a side has X_i = initial_eigenvalue^(-e_i) I.
        stagger: spread the refreshes over the interval, a share of the blocks on every step, so
            that no step after `start` carries them all. Inside `blocked` a block's turn depends on
            its number among all blocks alone, so that any number of ranks computes the same. It
            needs the counter or `step=`; `refresh=True` refreshes all, and torch.compile makes a
            graph for every step of the interval (its limit of 8 recompilations may stop that).

    Context: `step=` (from 1) or `refresh=` (a bool) decide for the stage; one of them is needed
    inside torch.compile, where the counter in the state can't be read.

    State: `RootInverseState`.

    Raises:
        ValueError: an argument out of range; from init and update, no `KroneckerState` upstream.
        RuntimeError: inside torch.compile without `step=` or `refresh=`.

    Reference: Shi et al., arXiv 2309.06497.

    >>> import torch
    >>> from funshampoo import chain, kronecker_statistics
    >>> from funshampoo.linalg import pseudo_inverse
    >>> tx = chain(kronecker_statistics(1.0), root_inverse(every=1, solver=pseudo_inverse()))
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params))[0]  # g / |g|
    {'w': tensor([0.6000, 0.8000])}
    """
    check_count("every", every)
    check_count("start", start)
    check_range("epsilon", epsilon, 0.0)
    check_exponents(exponents)
    if trace_scaling is not None:
        check_range("trace_scaling", trace_scaling, 0.0, 1.0, low_open=True)
    check_range("initial_eigenvalue", initial_eigenvalue, 0.0, low_open=True)
    solve = eigh(relative_epsilon=1e-6) if solver is None else solver
    if any([solve is factory for factory in _FACTORIES]):
        raise TypeError("solver makes solvers and is none: call it, as in linalg.eigh().")

    def init(params: Tree, *, upstream: Any = None, block_ndim: int = 0) -> RootInverseState:
        check_parameters(params, "root_inverse")
        if upstream is not None:
            _statistics_over(params, upstream)

        def initial(x: Tensor) -> tuple[FactorRoot | tuple[()], ...]:
            lead, sides = x.shape[:block_ndim], x.shape[block_ndim:] if x.numel() else ()
            powers = inverse_exponents(len(sides), exponents)
            return tuple(
                _multiple_of_identity(x, lead, d, initial_eigenvalue**-e) if e else ()
                for d, e in zip(sides, powers)
            )

        return RootInverseState(new_counter(), map_leaves(initial, params))

    def refreshed(
        u: Tensor, turn: Turn, factors: Any, weight: Tensor, sides: Any
    ) -> tuple[Any, ...]:
        powers = inverse_exponents(len(factors), exponents)
        new = []
        for factor, old, e in zip(factors, sides, powers):
            if old and turn.any:
                rows = turn.rows_on(u)
                chosen = FactorRoot(*[_rows(x, rows) for x in old])
                matrix = bias_corrected(_rows(_present(factor), rows), _rows(weight, rows))
                found = root_of(matrix, 1 / e, chosen)
                old = FactorRoot(*[_with_rows(x, rows, y) for x, y in zip(old, found)])
            new.append(old)
        return u, tuple(new)

    def root_of(matrix: Tensor, p: float, old: FactorRoot) -> FactorRoot:
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        if trace_scaling is not None:
            matrix = _trace_scaled(matrix, trace, trace_scaling, epsilon)
        return _keep_old_where_failed(solve(matrix, p, epsilon), old, known=trace != 0)

    def update(
        updates: Tree,
        state: RootInverseState,
        params: Tree = None,
        *,
        upstream: Any = (),
        block_ndim: int = 0,
        step: int | None = None,
        refresh: bool | None = None,
        block_ids: Any = None,
    ) -> tuple[Tree, RootInverseState]:
        statistics = _statistics_over(updates, upstream)
        roots = state.roots
        t = None if refresh is not None else _step_known(state.steps, step)
        if stagger and t is not None and t > start:
            turns = turns_at(t, every, updates, block_ids)
        else:
            due = refresh if t is None else refresh_due(t, every, start)
            turns = map_leaves(lambda u: EVERYBODY, updates) if due else None
        if turns is not None:
            inputs = (turns, statistics.factors, statistics.weight)
            _, roots = update_leaves(refreshed, updates, (roots,), inputs)

        directions = _directions(updates, roots, block_ndim)
        return directions, RootInverseState(state.steps + 1, roots)

    return GradientTransformation(init, update)


def precondition(x: Tensor, roots: Sequence[Tensor | None], block_ndim: int = 0) -> Tensor:
    """x ×_1 X_1 … ×_k X_k for every block, a mode product for every side that has a root.

    Args:
        x: (N, d_1, ..., d_k), or without N where block_ndim is 0.
        roots: one entry a side, (N, d_i, d_i), symmetric, or None.

    >>> precondition(torch.ones(2), [torch.tensor([[2.0, 0.0], [0.0, 3.0]])])
    tensor([2., 3.])
    """
    last = len(roots) - 1
    for side, root in enumerate(roots):
        if root is None:
            continue
        if side == last and side > 0:
            rows = x.reshape(*x.shape[:block_ndim], -1, x.shape[-1])
            x = matmul(rows, root).reshape(x.shape)  # symmetric: from the right, no transposed copy
        else:
            moved = x.movedim(block_ndim + side, block_ndim)
            product = matmul(root, moved.reshape(*moved.shape[: block_ndim + 1], -1))
            x = product.reshape(moved.shape).movedim(block_ndim, block_ndim + side)
    return x


def _directions(updates: Tree, roots: Tree, block_ndim: int) -> Tree:
    def direction(u: Tensor, sides: Any) -> tuple[Tensor]:
        matrices = [side.root if side else None for side in sides]
        return (precondition(u.to(compute_dtype(u)), matrices, block_ndim),)

    return update_leaves(direction, updates, (), (roots,))[0]


def _statistics_over(tree: Tree, upstream: Any) -> KroneckerState:
    found = find_state(upstream, KroneckerState)
    if found is None:
        raise ValueError(
            "root_inverse found no factor matrices: put kronecker_statistics(...) before it in the "
            "same chain, as in chain(kronecker_statistics(0.99), root_inverse(every=20))."
        )
    try:
        flatten(tree)[1].flatten_up_to(found.factors)
    except ValueError as error:
        raise ValueError(
            "root_inverse found the factor matrices of other blocks: put kronecker_statistics and "
            "root_inverse inside the same blocked(...)."
        ) from error
    return found


def _step_known(counter: Tensor, step: int | None) -> int:
    t = current_step(counter, step)
    if t is None:
        raise RuntimeError(
            "root_inverse can't read the step counter inside torch.compile: pass "
            "refresh=funshampoo.refresh_due(step, every, start), or step= (from 1), to update."
        )
    return t


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or x.ndim == 0 else x.index_select(0, rows)


def _with_rows(x: Tensor, rows: Tensor | None, new: Tensor) -> Tensor:
    return new if rows is None else x.index_copy(0, rows, new)


def _present(factor: Any) -> Tensor:
    if isinstance(factor, Tensor):
        return factor
    raise ValueError(
        "root_inverse preconditions a side for which kronecker_statistics keeps no factor: give "
        "both stages the same exponents."
    )


def _trace_scaled(matrix: Tensor, trace: Tensor, exponent: Hyper, epsilon: Hyper) -> Tensor:
    """A max(tr A, epsilon)^(-exponent); A itself where that is zero, which has no derivative."""
    floor = epsilon.to(trace) if isinstance(epsilon, Tensor) else trace.new_tensor(epsilon)
    size = torch.maximum(trace, floor)
    scale = power(torch.where(size > 0, size, 1.0), -exponent)
    return matrix * scale[..., None, None]


def _multiple_of_identity(x: Tensor, lead: torch.Size, d: int, value: float) -> FactorRoot:
    dtype = compute_dtype(x)
    eye = value * torch.eye(d, dtype=dtype, device=x.device)
    return FactorRoot(
        root=eye.expand(*lead, d, d).clone(),
        residual=x.new_zeros(lead, dtype=dtype),
        condition=x.new_ones(lead, dtype=dtype),
        failures=x.new_zeros(lead, dtype=torch.int64),
        streak=x.new_zeros(lead, dtype=torch.int64),
    )


def _keep_old_where_failed(found: InverseRoot, old: FactorRoot, known: Tensor) -> FactorRoot:
    """The new roots where the solver converged on statistics that are not zero, else the old."""
    accepted = found.converged & known
    failed = known & ~found.converged
    return FactorRoot(
        root=torch.where(accepted[..., None, None], found.root, old.root),
        residual=torch.where(accepted, found.residual, old.residual).detach(),
        condition=torch.where(accepted, found.condition, old.condition).detach(),
        failures=old.failures + failed,
        streak=torch.where(failed, old.streak + 1, 0),
    )
