"""Shampoo as a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_count, check_range, chosen
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, as_transformation
from funshampoo.core.live import is_exactly, mapped
from funshampoo.linalg import Solver, pseudo_inverse
from funshampoo.linalg.choice import default_solver
from funshampoo.operators.exponents import Exponents, Sides, chosen_sides
from funshampoo.recipes.in_blocks import Distribute, in_blocks
from funshampoo.transforms import (
    ema,
    graft,
    kronecker_statistics,
    root_inverse,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_rms,
    scale_by_sgd,
)
from funshampoo.transforms.weight_decay import DecayKind

Grafting: TypeAlias = Literal["adam", "rms", "adagrad", "sgd"] | GradientTransformation | None

Vectors: TypeAlias = Literal["diagonal", "blocks"]


def shampoo(
    learning_rate: Hyper | Schedule,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.99,
    beta3: Hyper | Literal["nesterov"] | None = None,
    epsilon: Hyper = 0.0,
    relative_epsilon: Hyper = 1e-6,
    every: int = 10,
    start: int = 1,
    statistics_every: int = 1,
    max_size: int | None = 1024,
    merge: Merge = "small",
    keep: int = 2,
    grafting: Grafting = "adam",
    grafting_beta2: Hyper | None = None,
    grafting_epsilon: Hyper = 1e-8,
    vectors: Vectors = "diagonal",
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    weight_decay_kind: DecayKind = "decoupled",
    decay_through_momentum: bool = False,
    peak_learning_rate: Hyper | None = None,
    mask: Mask | None = None,
    bias_correction: bool = True,
    weighted: bool = True,
    solver: Solver | None = None,
    exponents: Exponents | None = None,
    sides: Sides | None = None,
    trace_scaling: Hyper | None = None,
    initial_eigenvalue: float = 1.0,
    own_steps: bool = True,
    stagger: bool = False,
    basis_tolerance: Hyper | None = None,
    product_dtype: torch.dtype | None = None,
    packed: bool = False,
    max_failures: int | None = 20,
    spike_factor: Hyper | None = None,
    distribute: Distribute | None = None,
    tile: TileSize = "auto",
) -> GradientTransformation:
    """Shampoo with grafting.

        L_i ← beta2 L_i + (1-beta2) mat_i(G) mat_i(G)ᵀ            kronecker_statistics
        M ← beta1 M + (1-beta1) G,  M̂ = M / (1-beta1^t)          ema
        X_i ← (L_i/(1-beta2^t) + εI)^(-1/2k), on a refresh        root_inverse
        P = M̂ ×_1 X_1 … ×_k X_k,  P ← P ‖P_g‖/‖P‖ per block      graft(root_inverse, onto=...)
        B ← momentum B + (1-dampening) P                          trace
        W ← W - learning_rate (B + weight_decay W)                add_decayed_weights, ...

    Args:
        learning_rate: number, tensor, or schedule of the old step count. With grafting its scale is
            the grafted method's: with "adam", start from the rate that works for AdamW.
        beta1, beta3: the filter; see `ema`. beta3="nesterov" is its nesterov=True: beta1², whatever
            a scheduler makes of beta1, and worth trying.
        beta2: decay of the statistics; the number 1 means a plain sum.
        epsilon: absolute damping. It is 0 because the gradients' scale is unknown.
        relative_epsilon: relative to each factor's largest eigenvalue, for the default solver (one
            given as `solver` brings its own): the damping with grafting, the cut-off of the
            pseudo-inverse without. Below 1e-7 float32 roots are noise.
        every, start: refreshes happen at step `start` and on multiples of `every` after it. Until
            then a step is the grafted method's.
        statistics_every: accumulate statistics at step 1 and on multiples of this, and compute
            no products for them on other steps. See `every` of `kronecker_statistics`, also for
            what beta2 means then. `every` is best a multiple of it.
        max_size, merge, keep: blocks; see `blocked`. Matrices stay matrices (keep=2): merging a
            32×32 matrix into a 1024-vector costs a 1024×1024 factor.
        grafting: whose step length to take: "adam", "rms", "adagrad", "sgd", a transformation, or
            None for Shampoo's own. Without grafting nothing bounds a step in a direction that the
            statistics had not seen at the last refresh, so the default solver gives that direction
            no step at all: the truncated pseudo-inverse (unless epsilon is set).
        grafting_beta2, grafting_epsilon: of that method; beta2 by default (0.999 if that is 1).
        vectors: "diagonal": a block with one side or none, after merging (of a bias, a norm's
            scale, a scalar), takes the grafted method's own step and has no factor matrix, which
            would take d² numbers beside its d, and d³ for a refresh. "blocks": it is preconditioned
            like any other. It also is where exponents names order 1, where keep=1 makes vectors of
            matrices, and without grafting, when there is no other step to take.
        momentum, nesterov, dampening: see `trace`. The number 0 for momentum leaves the stage out;
            nesterov needs one.
        weight_decay, weight_decay_kind, peak_learning_rate, mask: see `add_decayed_weights`.
        decay_through_momentum: add decoupled decay before the momentum, as the reference does,
            instead of after it, as AdamW does.
        bias_correction: of the filter and the statistics.
        weighted: False: L ← beta2 L + mat matᵀ.
        solver, trace_scaling, initial_eigenvalue: see `root_inverse`.
        exponents: of the inverse roots: "shampoo", the default, 1/(2k) with k sides (1/4 for
            matrices); "shampoo_squared", 1/k (1/2); a number, which is that of matrices; or
            {k: e}. See `root_inverse`.
        sides: which sides are preconditioned. "smaller": only the shortest of every block, with
            twice the exponent of a matrix's side: (G Gᵀ)^(-1/2) G. It saves the larger factor and
            its root. By default all.
        own_steps: bias correction counts each parameter's own gradients, not the global steps.
        stagger: spread the refreshes over the interval; see `root_inverse`.
        basis_tolerance: continue in old eigenbases while they are this good; see `root_inverse`.
        product_dtype: torch.bfloat16 rounds the operands of the large products, with sums in
            float32: the application of the roots, and on CUDA the statistics. State stays float32.
        packed: store half of every factor matrix and root of side 64 or more, which are
            symmetric; see `funshampoo.operators.packed`.
        max_failures: a block that fails this many times in a row stops training; see `guarded`.
        spike_factor: hold a block whose gradient is more than this times its average norm; see
            `guarded`. 10 to 100 is usual; None holds only non-finite gradients.
        distribute: `funshampoo.sharded`, to shard the blocks over data-parallel ranks, or
            functools.partial of it with options. Any function of the chain inside `blocked`, and of
            the keywords `every` and `max_failures`, that returns what runs in its place.
        tile: how many numbers a donated step works on at once; see `blocked`. "auto" unless
            grafting is a transformation of yours.

    The defaults were chosen on the two tasks of examples/train.py, each at its best learning rate
    (steps to 97 % on the digits, five seeds; evaluated every 5 steps). The default takes 45, and so
    does vectors="blocks"; start=every 65, every=1 40 and every=20 50, relative_epsilon=1e-7 45 and
    1e-3 50, max_size=128 60, merge="none" 65, grafting="rms" 65 and "adagrad" 70; beta2 from 0.9 to
    0.999 makes no difference. beta3=0.8 took 35. On the text (steps to a loss of 2.5, three seeds)
    the default and vectors="blocks" take 80.

    Context: `step=` or `refresh=` as in `root_inverse`.

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: Gupta et al., arXiv 1802.09568; Anil et al., arXiv 2002.09018; Shi et al.,
    arXiv 2309.06497.

    >>> import torch
    >>> tx = shampoo(0.1)
    >>> params = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": torch.ones(2, 3), "b": torch.ones(2)}, state, params)
    >>> updates["b"]
    tensor([-0.1000, -0.1000])
    """
    without_vectors = chosen_sides(vectors, sides)
    check_count("statistics_every", statistics_every)
    diagonal = _are_diagonal(vectors, grafting is not None, merge, keep, exponents)
    sides = without_vectors if diagonal else sides
    if solver is None:
        truncate = grafting is None and is_exactly(epsilon, 0)
        damped = default_solver(relative_epsilon, basis_tolerance)
        solver = pseudo_inverse(rtol=relative_epsilon) if truncate else damped
    matrices: Any = {"exponents": exponents, "sides": sides, "packed": packed}
    statistics = kronecker_statistics(
        beta2,
        every=statistics_every,
        bias_correction=bias_correction,
        weighted=weighted,
        own_steps=own_steps,
        product_dtype=product_dtype,
        **matrices,
    )
    direction = root_inverse(
        every,
        start=start,
        epsilon=epsilon,
        solver=solver,
        trace_scaling=trace_scaling,
        initial_eigenvalue=initial_eigenvalue,
        stagger=stagger,
        basis_tolerance=basis_tolerance,
        product_dtype=product_dtype,
        **matrices,
    )
    onto = _grafting_partner(grafting, grafting_beta2, beta2, grafting_epsilon, own_steps)
    if onto is not None:
        direction = graft(direction, onto, start=start, least_order=2 if diagonal else 0)
    if tile == "auto" and not (grafting is None or isinstance(grafting, str)):
        tile = None  # who knows what it does across blocks
    ahead: Any = {"nesterov": True} if beta3 == "nesterov" else {"beta3": beta3}
    average = ema(beta1, **ahead, bias_correction=bias_correction, own_steps=own_steps)
    return in_blocks(
        [statistics, average, direction],
        learning_rate=learning_rate,
        every=every,
        max_size=max_size,
        merge=merge,
        keep=keep,
        momentum=momentum,
        nesterov=nesterov,
        dampening=dampening,
        weight_decay=weight_decay,
        weight_decay_kind=weight_decay_kind,
        decay_through_momentum=decay_through_momentum,
        peak_learning_rate=peak_learning_rate,
        mask=mask,
        max_failures=max_failures,
        spike_factor=spike_factor,
        distribute=distribute,
        tile=tile,
    )


def _are_diagonal(
    vectors: Vectors, grafted: bool, merge: Merge, keep: int, exponents: Exponents | None
) -> bool:
    """Whether blocks with less than two sides take the grafted method's step."""
    makes_vectors = merge == "small" and keep == 1
    names_them = isinstance(exponents, Mapping) and 1 in exponents
    return vectors == "diagonal" and grafted and not makes_vectors and not names_them


def _below_one(beta2: Hyper) -> Hyper:
    if isinstance(beta2, Tensor):
        return torch.where(beta2 == 1, 0.999, beta2)
    return 0.999 if beta2 == 1 else beta2


def _grafting_partner(
    grafting: Any, own_beta2: Any, beta2: Hyper, epsilon: Hyper, own_steps: bool
) -> GradientTransformation | None:
    if grafting is None:
        return None
    if not isinstance(grafting, str):
        return as_transformation(grafting)
    beta = mapped(beta2, _below_one) if own_beta2 is None else own_beta2
    partners: dict[str, Callable[[], GradientTransformation]] = {
        "adam": lambda: scale_by_adam(0.0, beta, epsilon, own_steps=own_steps),
        "rms": lambda: scale_by_rms(beta, epsilon),
        "adagrad": lambda: scale_by_adagrad(epsilon),
        "sgd": scale_by_sgd,
    }
    make: Callable[[], GradientTransformation] = chosen("grafting", grafting, partners)
    check_range("grafting_epsilon", epsilon, 0.0)
    if own_beta2 is not None:
        check_range("grafting_beta2", own_beta2, 0.0, 1.0, high_open=True)
    return make()
