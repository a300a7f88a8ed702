"""Inverse roots of the factor matrices, and the direction they give."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from funshampoo import linalg
from funshampoo.core.checks import check_count, check_flag, check_range
from funshampoo.core.clock import current_step, new_counter
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, number, resolved
from funshampoo.core.modes import full_precision
from funshampoo.core.tree import (
    cast,
    check_local,
    compute_dtype,
    flatten,
    map_leaves,
    update_leaves,
)
from funshampoo.linalg import Solver, eigh
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.low_precision import check_product_dtype
from funshampoo.operators.exponents import Exponents, check_exponents, inverse_exponents
from funshampoo.operators.mode_products import precondition
from funshampoo.operators.packed import pack, packs
from funshampoo.refresh.refresh import Refresh
from funshampoo.refresh.turns import (
    Refreshes,
    RefreshSchedule,
    everybody,
    happens_at,
    refreshes_at,
)
from funshampoo.state.stages import FactorRoot, KroneckerState, RootInverseState, find_state

_FACTORIES: tuple[Any, ...] = (
    linalg.by_device,
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
    basis_tolerance: Hyper | None = None,
    delay: int = 0,
    product_dtype: torch.dtype | None = None,
    packed: bool = False,
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
        basis_tolerance: keep each factor's eigenbasis Q in the state (as much memory as X_i), and
            on a refresh go on in it, with new eigenvalues diag(QᵀLQ), for as long as
            ‖offdiag(QᵀLQ)‖_F ≤ basis_tolerance ‖L‖_F; see `linalg.adaptive`. For solvers by
            eigendecomposition. A refresh that keeps all bases takes 0.45 to 0.5 of the time, one
            that keeps none 1.3 of it (sides 128 to 512, one thread), so it pays from a third kept.
        delay: the roots of step t come into use on step t + delay < t + every. Meanwhile a second
            thread computes them with one kernel thread, while the next steps run on the old roots.
            The first refresh and `refresh=True` are at once. The state keeps the factors that wait
            (as much memory as X_i) and is all that a step depends on: where their roots were not
            computed ahead, they are computed on step t + delay, the same to the last bit. That is
            so on a GPU, under torch.func and torch.compile, for hyperparameters that are tensors,
            and for a state resumed from a checkpoint. It pays where a core is idle: two kernel
            threads on two cores take as long with it as without.
        product_dtype: torch.bfloat16 to round M and the X_i to before they are multiplied; sums
            are float32, roots are computed and kept as without. It errs by up to 5 % at a
            condition of 1e6, and pays where the device multiplies bfloat16: on GPUs and CPUs with
            AVX512-BF16, half the time of these products or less. See `linalg.low_precision`.
        packed: keep one triangle of every X_i of side 64 or more, and make the matrix of it on
            every step. See `operators.packed`; the statistics have the same option, and need not
            have the same value. What basis_tolerance and delay add to the state stays whole.

    Context: `step=` (from 1) or `refresh=` (a bool) decide for the stage; one of them is needed
    inside torch.compile, where the counter in the state can't be read.

    On the CPU, roots by eigendecomposition are computed by as many threads as
    torch.get_num_threads() says, each with one kernel thread, on different matrices. One of a side
    above 256 that would leave the others idle is computed first, by all kernel threads.

    State: `RootInverseState`.

    Raises:
        ValueError: an argument out of range; basis_tolerance with a solver without a basis; from
            init and update, no `KroneckerState` upstream.
        RuntimeError: inside torch.compile without `step=` or `refresh=`.

    Reference: Shi et al., arXiv 2309.06497; for basis_tolerance, Eschenhagen et al., arXiv
    2506.03595.

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
    check_product_dtype(product_dtype)
    check_flag("stagger", stagger)
    check_flag("packed", packed)
    solve = eigh(relative_epsilon=1e-6) if solver is None else solver
    if any([solve is factory for factory in _FACTORIES]):
        raise TypeError("solver makes solvers and is none: call it, as in linalg.eigh().")
    if basis_tolerance is not None:
        _check_basis_tolerance(basis_tolerance, solve)
    check_count("delay", delay, least=0)
    if delay and delay >= every:
        raise ValueError(f"delay is {delay}; it must be less than every, {every}.")
    schedule = RefreshSchedule(every, start, stagger, delay)

    def init(params: Tree, *, upstream: Any = None, block_ndim: int = 0) -> RootInverseState:
        check_local(params, "root_inverse")
        if upstream is not None:
            _statistics_over(params, upstream)

        first_root = functools.partial(
            _multiple_of_identity,
            keeps_basis=basis_tolerance is not None,
            delayed=delay > 0,
            packed=packed,
        )

        def initial(x: Tensor) -> tuple[FactorRoot | tuple[()], ...]:
            lead, sides = x.shape[:block_ndim], x.shape[block_ndim:] if x.numel() else ()
            powers = inverse_exponents(len(sides), exponents)
            return tuple(
                first_root(x, lead, d, initial_eigenvalue**-e) if e else ()
                for d, e in zip(sides, powers)
            )

        return RootInverseState(new_counter(), map_leaves(initial, params))

    def update(
        updates: Tree,
        state: RootInverseState,
        params: Tree = None,
        *,
        upstream: Any = (),
        block_ndim: int = 0,
        step: int | None = None,
        refresh: bool | None = None,
        rows: Any = None,
        donate: bool = False,
        hyper: Numbers = NO_NUMBERS,
    ) -> tuple[Tree, RootInverseState]:
        statistics = _statistics_over(updates, upstream)
        roots = state.roots
        t = None if refresh is not None else _step_known(state.steps, step)
        if t is None:
            turns = Refreshes(now=everybody(updates) if refresh else None)
        else:
            turns = refreshes_at(t, schedule, updates, rows)
        now = [number(x, hyper) for x in (epsilon, trace_scaling, basis_tolerance)]
        refreshed = Refresh(resolved(solve, hyper), now[0], exponents, now[1], now[2])
        with full_precision():
            roots = refreshed(turns, updates, statistics, roots, donate)
            directions = _directions(updates, roots, block_ndim, product_dtype)
        return directions, RootInverseState(state.steps + 1, roots)

    def phase(step: int) -> tuple[str, ...]:
        if not any(happens_at(step, schedule)):
            return ()
        turn = f" {step % every} of {every}" if stagger and step > start else ""
        return ("refresh in threads" + turn,)

    return GradientTransformation(init, update, phase=phase)


def _directions(
    updates: Tree, roots: Tree, block_ndim: int, product_dtype: torch.dtype | None
) -> Tree:
    def direction(u: Tensor, sides: Any) -> tuple[Tensor]:
        matrices = [side.root if side else None for side in sides]
        return (precondition(cast(u, compute_dtype(u)), matrices, block_ndim, product_dtype),)

    return update_leaves(direction, updates, (), (roots,))[0]


def _check_basis_tolerance(tolerance: Hyper, solver: Solver) -> None:
    check_range("basis_tolerance", tolerance, 0.0)
    if not isinstance(solver, EigenSolver):
        raise ValueError(
            "basis_tolerance needs a solver that works in an eigenbasis: give linalg.eigh() or "
            "linalg.pseudo_inverse(), or leave basis_tolerance out."
        )


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
            "root_inverse can't read the step counter inside torch.compile. Let funshampoo compile "
            "(compiled(tx), or Optimizer(..., compile=True)), or pass step= (from 1) or "
            "refresh=funshampoo.refresh_due(step, every, start) to update."
        )
    return t


def _multiple_of_identity(
    x: Tensor,
    lead: torch.Size,
    d: int,
    value: float,
    *,
    keeps_basis: bool,
    delayed: bool,
    packed: bool,
) -> FactorRoot:
    dtype = compute_dtype(x)
    eye = torch.eye(d, dtype=dtype, device=x.device).expand(*lead, d, d)
    return FactorRoot(
        root=value * (pack(eye) if packs(d, packed) else eye),
        residual=x.new_zeros(lead, dtype=dtype),
        condition=x.new_ones(lead, dtype=dtype),
        failures=x.new_zeros(lead, dtype=torch.int64),
        streak=x.new_zeros(lead, dtype=torch.int64),
        basis=eye.clone() if keeps_basis else (),
        pending=torch.zeros_like(eye, memory_format=torch.contiguous_format) if delayed else (),
        waiting=x.new_zeros(lead, dtype=torch.int64) if delayed else (),
    )
