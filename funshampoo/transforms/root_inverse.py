"""Shampoo's preconditioner: inverse roots of the factor matrices, applied to the updates."""

from __future__ import annotations

from typing import Any

import torch

from funshampoo.core.checks import check_flag, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers
from funshampoo.core.parameters import check_local
from funshampoo.core.traits import OF_SIDES, with_traits
from funshampoo.linalg import Solver
from funshampoo.linalg.choice import chosen_solver
from funshampoo.linalg.eigensolver import check_undamped, pseudo_inverse
from funshampoo.linalg.low_precision import check_product_dtype
from funshampoo.linalg.solver import relative_cost
from funshampoo.operators.exponents import Exponents, Sides, check_exponents
from funshampoo.operators.mode_products import mode_flops
from funshampoo.operators.turning import preconditioned
from funshampoo.refresh import Refreshing, RefreshSchedule
from funshampoo.refresh.factors import refreshed
from funshampoo.refresh.roots import root_rules
from funshampoo.state.partners import check_nearest, statistics_of
from funshampoo.state.stages import RefreshedState


def root_inverse(
    every: int = 10,
    *,
    start: int = 1,
    epsilon: Hyper = 0.0,
    solver: Solver | None = None,
    exponents: Exponents | None = None,
    sides: Sides | None = None,
    trace_scaling: Hyper | None = None,
    initial_eigenvalue: float = 1.0,
    stagger: bool = False,
    basis_tolerance: Hyper | None = None,
    product_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> GradientTransformation:
    """Shampoo's preconditioner: multiply by inverse roots of the factors, refreshed periodically.

        on a refresh:   X_i ← (L_i / weight + epsilon I)^(-e_i)
        on every step:  P = M ×_1 X_1 … ×_k X_k

    L_i and weight come from the `KroneckerState` upstream and include this step's gradient; M is
    the updates that reach this stage. Until its first refresh a block has X_i = I.

    If the solver fails for a matrix, the refresh keeps its old root and counts the failure. It also
    keeps the old root if the statistics are still exactly zero, since (0 + epsilon I)^(-e) would be
    an enormous multiple of the identity, applied to the first real gradient; or if no entry is a
    normal number, as after 9,000 gradients of zeros with beta2=0.99.

    Args:
        every: steps between refreshes.
        start: the step of the first refresh; later ones fall on multiples of `every`. Pass the same
            to `graft`, so that its step is the other method's until then.
        epsilon: absolute damping, ≥ 0 (number or tensor). Damping relative to the largest
            eigenvalue is set in the solver: `eigh(relative_epsilon=...)`.
        solver: a function of `funshampoo.linalg`; by default, with relative_epsilon=1e-6, by_device
            (eigh on a CPU), or eigh if basis_tolerance needs a basis. In float32 some damping
            relative to the largest eigenvalue, 1e-7 or more, is needed.
        exponents: the e_i. By default "shampoo": 1/(2k) with k sides, for matrices 1/4;
            "shampoo_squared": 1/k, for matrices 1/2; a number: the exponent for matrices, in
            general 2 exponents / k. {k: e, or {side: e}} sets them by hand; 0 leaves a side alone.
        sides: which sides are preconditioned, by default all. "smaller": only the shortest of each
            block, of equal ones the first (k = 1: for matrices the exponent 1/2); or a function of
            a block's shape that returns one bool per side. Pass the same exponents and sides to
            `kronecker_statistics`, so that it skips the unused factors.
        trace_scaling: an exponent s in (0, 1]: take roots of A · max(tr A, epsilon)^(-s) instead of
            A = L_i / weight.
        initial_eigenvalue: X_i = initial_eigenvalue^(-e_i) I before a side's first refresh.
        stagger: spread the refreshes over the interval, a share of the blocks on every step, so
            that no step after `start` carries them all. Inside `blocked`, a block's turn depends
            only on its index among all blocks, so that any number of ranks computes the same. It
            needs the counter or `step=`; `refresh=True` refreshes all, and torch.compile makes a
            graph for every step of the interval (its limit of 8 recompilations may stop that).
        basis_tolerance: keep each factor's eigenbasis Q in the state (as much memory as X_i), and
            reuse it on a refresh, with new eigenvalues diag(QᵀLQ), as long as ‖offdiag(QᵀLQ)‖_F ≤
            basis_tolerance ‖L‖_F; see `linalg.adaptive`. For solvers by eigendecomposition. A
            refresh that keeps all bases takes 0.45 to 0.5 of the time, one that keeps none 1.3 of
            it (sides 128 to 512, one thread), so it pays once a third are kept.
        product_dtype: torch.bfloat16 rounds M and the X_i before they are multiplied; sums are
            float32, roots are computed and stored as without it. The error is up to 5 % at a
            condition of 1e6. It pays where the device multiplies bfloat16: on GPUs and CPUs with
            AVX512-BF16, half the time of these products or less. See `linalg.low_precision`.
        packed: store one triangle of every X_i of side 64 or more, and expand it on every step. See
            `operators.packed`. The statistics have the same option, and need not have the same
            value. The bases of basis_tolerance stay whole.

    Context: `step=` (from 1) or `refresh=` (a bool) decide for the stage; inside torch.compile,
    where the counter in the state can't be read, one of them is required.

    On the CPU, roots by eigendecomposition are computed by torch.get_num_threads() threads, each
    with one kernel thread, on different matrices. A matrix of side above 256 that would leave the
    others idle is computed first, by all kernel threads.

    State: `RefreshedState`, whose values are X_i and, with basis_tolerance, Q.

    Raises:
        ValueError: an argument out of range; basis_tolerance with a solver without a basis; from
            init and update, no `KroneckerState` upstream.
        RuntimeError: inside torch.compile without `step=` or `refresh=`.

    Reference: Shi et al., arXiv 2309.06497; for basis_tolerance, Eschenhagen et al., arXiv
    2506.03595; for exponents and sides, see `operators.exponents`.

    >>> import torch
    >>> from funshampoo import chain, kronecker_statistics
    >>> from funshampoo.linalg import pseudo_inverse
    >>> tx = chain(kronecker_statistics(1.0), root_inverse(every=1, solver=pseudo_inverse()))
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params))[0]  # g / |g|
    {'w': tensor([0.6000, 0.8000])}
    """
    check_range("epsilon", epsilon, 0.0)
    check_exponents(exponents, sides)
    if trace_scaling is not None:
        check_range("trace_scaling", trace_scaling, 0.0, 1.0, low_open=True)
    check_range("initial_eigenvalue", initial_eigenvalue, 0.0, low_open=True)
    check_product_dtype(product_dtype)
    check_flag("packed", packed)
    solve = chosen_solver(solver, basis_tolerance)
    if isinstance(solve, pseudo_inverse):  # its own check comes with a refresh, in mid-step
        check_undamped(epsilon)
    schedule = RefreshSchedule(every, start, stagger)
    given = solve, epsilon, trace_scaling, basis_tolerance
    at_first = None, 0.0, None, basis_tolerance  # what `init` does without is not part of it

    def roots(hyper: Numbers, numbers: tuple[Any, ...]) -> Refreshing:
        rules = root_rules(exponents, sides, initial_eigenvalue, numbers, hyper)
        return Refreshing(rules, schedule, packed)

    def init(
        params: Tree, *, upstream: Any = (), block_ndim: int = 0, clock: bool = False
    ) -> RefreshedState:
        check_local(params, "root_inverse")
        statistics_of(upstream, "root_inverse", params)
        check_nearest(upstream, "root_inverse")
        return roots(NO_NUMBERS, at_first).init(params, block_ndim, clock)

    def update(
        updates: Tree, state: RefreshedState, params: Tree, context: Context
    ) -> tuple[Tree, RefreshedState]:
        state = refreshed(roots(context.hyper, given), updates, state, context, "root_inverse")
        return preconditioned(updates, state.kept, context.block_ndim, product_dtype), state

    stage = GradientTransformation(
        init,
        update,
        phase=schedule.phase(threads=bool(getattr(solve, "threaded", False))),
        counts=True,
        numbers=[epsilon, trace_scaling, basis_tolerance, solve],
        flops=mode_flops,
        refresh_cost=relative_cost(solve),
    )
    return with_traits(stage, OF_SIDES)
