"""Inverse roots of the factor matrices, and the direction they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo import linalg
from funshampoo.core.checks import check_flag, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import NO_NUMBERS, Numbers, number, resolved
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import cast, update_leaves, wide
from funshampoo.linalg import Solver
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.low_precision import check_product_dtype
from funshampoo.linalg.products import power
from funshampoo.linalg.solver import relative_cost
from funshampoo.linalg.support import on_support
from funshampoo.operators.exponents import (
    Exponents,
    Sides,
    check_exponents,
    check_sides,
    side_exponents,
)
from funshampoo.operators.mode_products import bias_corrected, mode_flops, precondition
from funshampoo.operators.turning import matrices_of
from funshampoo.refresh.jobs import Reading
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, Rule
from funshampoo.refresh.turns import RefreshSchedule
from funshampoo.state.stages import RefreshedState
from funshampoo.state.upstream import statistics_of
from funshampoo.transforms.kronecker import factors_and_weights

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
    sides: Sides | None = None,
    trace_scaling: Hyper | None = None,
    initial_eigenvalue: float = 1.0,
    stagger: bool = False,
    basis_tolerance: Hyper | None = None,
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
    multiple of the identity that the first real gradient would meet. So it does where no entry is
    a normal number, as after 9,000 gradients of zeros with beta2=0.99.

    Args:
        every: steps between refreshes.
        start: the step of the first refresh; later ones fall on multiples of `every`. Give `graft`
            the same, so that its step is the other method's until then.
        epsilon: absolute damping, ≥ 0 (number or tensor). Damping relative to the largest
            eigenvalue is the solver's: `eigh(relative_epsilon=...)`.
        solver: a function of `funshampoo.linalg`; by default, with relative_epsilon=1e-6, by_device
            (eigh on a CPU), or eigh where basis_tolerance asks for a basis. In float32 some damping
            relative to the largest eigenvalue, 1e-7 or more, is needed.
        exponents: the e_i. By default "shampoo": 1/(2k) with k sides, for matrices 1/4;
            "shampoo_squared": 1/k, for matrices 1/2; a number: what it says for matrices, in
            general 2 exponents / k. {k: e, or {side: e}} sets them by hand; 0 leaves a side alone.
        sides: which are preconditioned, all by default. "smaller": of each block the shortest
            alone, of equal ones the first (k = 1: for matrices the exponent 1/2); or a function of
            a block's shape that returns a bool a side. Give `kronecker_statistics` the same
            exponents and sides, so that it spares the factors.
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
        product_dtype: torch.bfloat16 to round M and the X_i to before they are multiplied; sums
            are float32, roots are computed and kept as without. It errs by up to 5 % at a
            condition of 1e6, and pays where the device multiplies bfloat16: on GPUs and CPUs with
            AVX512-BF16, half the time of these products or less. See `linalg.low_precision`.
        packed: keep one triangle of every X_i of side 64 or more, and make the matrix of it on
            every step. See `operators.packed`; the statistics have the same option, and need not
            have the same value. What basis_tolerance adds to the state stays whole.

    Context: `step=` (from 1) or `refresh=` (a bool) decide for the stage; one of them is needed
    inside torch.compile, where the counter in the state can't be read.

    On the CPU, roots by eigendecomposition are computed by as many threads as
    torch.get_num_threads() says, each with one kernel thread, on different matrices. One of a side
    above 256 that would leave the others idle is computed first, by all kernel threads.

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
    check_exponents(exponents)
    check_sides(sides)
    if trace_scaling is not None:
        check_range("trace_scaling", trace_scaling, 0.0, 1.0, low_open=True)
    check_range("initial_eigenvalue", initial_eigenvalue, 0.0, low_open=True)
    check_product_dtype(product_dtype)
    check_flag("packed", packed)
    solve = default_solver(1e-6, basis_tolerance) if solver is None else solver
    if not callable(solve):
        raise TypeError(f"solver is {solve!r}; give one of funshampoo.linalg, as linalg.eigh().")
    if any([solve is factory for factory in _FACTORIES]):
        raise TypeError("solver makes solvers and is none: call it, as in linalg.eigh().")
    if basis_tolerance is not None:
        _check_basis_tolerance(basis_tolerance, solve)

    schedule = RefreshSchedule(every, start, stagger)
    threads = bool(getattr(solve, "threaded", False))

    def roots_with(hyper: Numbers) -> Refreshing:
        numbers: list[Any] = []  # looked up on a refresh alone; for all blocks, which share batches

        def rules(block: tuple[int, ...]) -> list[Rule | None]:
            if not numbers:
                own = [number(x, hyper) for x in (epsilon, trace_scaling, basis_tolerance)]
                numbers.extend([resolved(solve, hyper), *own])
            powers = zip(block, side_exponents(block, exponents, sides))
            return [
                RootRule(d, e, initial_eigenvalue**-e, *numbers) if e else None for d, e in powers
            ]

        return Refreshing(rules, schedule, packed)

    def init(
        params: Tree, *, upstream: Any = None, block_ndim: int = 0, clock: bool = False
    ) -> RefreshedState:
        check_local(params, "root_inverse")
        if upstream is not None:
            statistics_of(upstream, "root_inverse", params)
        return roots_with(NO_NUMBERS).init(params, block_ndim, clock)

    def update(
        updates: Tree, state: RefreshedState, params: Tree, context: Context
    ) -> tuple[Tree, RefreshedState]:
        inputs = factors_and_weights(updates, context, "root_inverse")
        state = roots_with(context.hyper).update(updates, state, inputs, _factor, context)
        with product_precision():
            return _directions(updates, state.kept, context.block_ndim, product_dtype), state

    looked_up = [epsilon, trace_scaling, basis_tolerance, solve]
    return GradientTransformation(
        init,
        update,
        phase=schedule.phase(threads),
        counts=True,
        numbers=looked_up,
        flops=mode_flops,
        refresh_cost=relative_cost(solve),
    )


def default_solver(relative_epsilon: Hyper, basis_tolerance: Hyper | None = None) -> Solver:
    """The solver for this damping where none is given; with a tolerance, one that has a basis."""
    make = linalg.by_device if basis_tolerance is None else linalg.eigh
    return make(relative_epsilon=relative_epsilon)


@dataclass(frozen=True)
class RootRule(Rule):
    """X = (A + epsilon I)^(-e), A a bias-corrected factor, perhaps scaled by its trace.

    The value is X, and with `basis_tolerance` the eigenvectors that it was computed in.

    Attributes:
        exponent: e.
        initial_value: X = initial_value · I before the first refresh.
        solver, epsilon, trace_scaling, basis_tolerance: of `root_inverse`.
    """

    exponent: float
    initial_value: float
    solver: Solver
    epsilon: Hyper
    trace_scaling: Hyper | None
    basis_tolerance: Hyper | None

    symmetric = (0,)

    @property
    def threaded(self) -> bool:
        """As the solver says."""
        return bool(getattr(self.solver, "threaded", False))

    @property
    def relative_cost(self) -> float:
        """As the solver says."""
        return relative_cost(self.solver)

    @property
    def reads_old(self) -> bool:
        """To go on in an old basis."""
        return self.basis_tolerance is not None

    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """A multiple of the identity; as a basis, the identity."""
        eye = torch.eye(self.side, dtype=like.dtype, device=like.device).expand(like.shape)
        return (self.initial_value * eye, *((eye,) if self.reads_old else ()))

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The root of each matrix, whatever its round."""
        if self.trace_scaling is not None:
            A = _trace_scaled(A, self.trace_scaling, self.epsilon)
        p = 1 / self.exponent
        basis: tuple[Tensor, ...] = ()
        if self.basis_tolerance is None:
            found = self.solver(A, p, self.epsilon)
        else:
            assert isinstance(self.solver, EigenSolver)
            found, Q = self.solver.near_basis(A, p, self.epsilon, old[1], self.basis_tolerance)
            basis = (Q,)
        X, residual, condition, converged = found
        return Found((on_support(X, A), *basis), residual, condition, converged)


def _trace_scaled(A: Tensor, exponent: Hyper, epsilon: Hyper) -> Tensor:
    """A max(tr A, epsilon)^(-exponent); A itself where that is zero, which has no derivative."""
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = epsilon.to(trace) if isinstance(epsilon, Tensor) else epsilon
    size = trace.clamp(min=floor)
    scale = power(torch.where(size > 0, size, 1.0), -exponent)
    return A * cast(scale, A.dtype)[..., None, None]


def _factor(side: int, factors: Any, weight: Tensor) -> Reading:
    """L_side / weight."""
    if not isinstance(factors[side], Tensor):
        raise ValueError(
            "root_inverse preconditions a side for which kronecker_statistics keeps no factor: "
            "give both stages the same exponents and sides."
        )
    return bias_corrected, factors[side], weight


def _directions(
    updates: Tree, roots: Tree, block_ndim: int, product_dtype: torch.dtype | None
) -> Tree:
    def direction(u: Tensor, sides: Any) -> tuple[Tensor]:
        if not any(sides):
            return (wide(u),)
        return (precondition(wide(u), matrices_of(sides), block_ndim, product_dtype),)

    return update_leaves(direction, updates, (), (roots,))[0]


def _check_basis_tolerance(tolerance: Hyper, solver: Solver) -> None:
    check_range("basis_tolerance", tolerance, 0.0)
    if not isinstance(solver, EigenSolver):
        raise ValueError(
            "basis_tolerance needs a solver that works in an eigenbasis: give linalg.eigh() or "
            "linalg.pseudo_inverse(), or leave basis_tolerance out."
        )
