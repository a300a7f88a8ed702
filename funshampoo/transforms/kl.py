"""Statistics in which a block's sides are freed of each other: KL-Shampoo."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

from torch import Tensor

from funshampoo.core.checks import check_choice, check_flags, check_range
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import is_exactly, number
from funshampoo.core.modes import product_precision
from funshampoo.core.parameters import check_local
from funshampoo.core.tree import MaskedNode, cast, compute_dtype, flatten, map_leaves, update_leaves
from funshampoo.operators.exponents import Sides, check_sides, wanted_sides
from funshampoo.operators.kl import WHITENED, Block, Least, kl_flops
from funshampoo.operators.leaf_ops import kept_share
from funshampoo.operators.mode_products import unfold
from funshampoo.operators.weights import counted, first_weights, weights_over
from funshampoo.state.eigenbases import EigenbasisState, KlState
from funshampoo.state.nodes import first_state
from funshampoo.state.stages import KroneckerState, RefreshedState
from funshampoo.state.upstream import hidden_error
from funshampoo.transforms.kronecker import accumulated_factor, zero_factors_of

Through: TypeAlias = Literal["eigenvalues", "ritz", "roots"]


def kl_statistics(
    beta2: Hyper = 0.98,
    *,
    through: Through = "eigenvalues",
    initial_eigenvalue: float = 0.1,
    least_eigenvalue: Least = 0.0,
    damping: Hyper = 0.0,
    bias_correction: bool = True,
    weighted: bool = True,
    normalized: bool = True,
    own_steps: bool = True,
    starts_whole: bool = False,
    in_turn: bool = False,
    sides: Sides | None = None,
) -> GradientTransformation:
    """Accumulate one factor matrix a side, each of the gradient whitened along the other sides.

        L_i ← beta2 L_i + (1 - beta2) (d_i / n) mat_i(G_i) mat_i(G_i)ᵀ
        G_i = G ×_j S_j^(-1/2)   over the other sides j,   n = d_1 ⋯ d_k

    The L_i minimize the KL divergence between a Gaussian with the gradient's second moment and one
    with the covariance L_1 ⊗ … ⊗ L_k. S_j is the estimate of L_j from before this step, as the
    stage that comes later in the chain has it:

    - "roots": G_i is G preconditioned by the X_j of `root_inverse`, whose exponents ought to be
      1/2: L_j^(-1/2);
    - "eigenvalues": S_j = Q_j diag(λ_j) Q_jᵀ with the bases of `in_eigenbasis`, however old, and
      eigenvalues of their own, renewed on every step from the gradient's coordinates in the bases:

          R = G ×_1 Q_1ᵀ … ×_k Q_kᵀ
          λ_i ← beta2 λ_i + (1 - beta2) (mean over the other sides of (R ×_j λ_j^(-1/2))²
                                         + damping Π_j mean(1 / λ_j))

      A block's first gradient finds no bases: its L_i are plain and λ_i stays where it begins;
    - "ritz": the same with λ_j = diag(Q_jᵀ L_j Q_j), which costs a product of d³ a side.

    Args:
        beta2: decay of all averages, in [0, 1); with "roots" the number 1 is a plain sum.
        through: see above.
        initial_eigenvalue: of all λ_i, above 0; read with "eigenvalues" alone, as damping is.
        least_eigenvalue: a floor, or a function of d_i: ≥ 0, of λ_i once it has been renewed (but
            an eigenvalue of exactly 0 stays, and its direction is left out); above 0, of Ritz
            values. Not read with "roots".
        damping: ≥ 0, see above.
        bias_correction, weighted, own_steps: as in `kronecker_statistics`; of L_i alone.
        normalized: False leaves the factor d_i / n out, which is 1 / (the other side) of a matrix.
        starts_whole: a block's first gradient enters L_i with weight 1 in the place of 1 - beta2.
            With "eigenvalues" alone, and bias_correction=False.
        in_turn: with "eigenvalues" alone: of three sides, let some use the eigenvalues that others
            have got on this step, as the published code does: the second the third's, the first the
            second's.
        sides: as in `kronecker_statistics`; one for which it is False gets no factor matrix. With
            "eigenvalues" it has λ_i all the same, in the coordinates as they are.

    State: `KlState`; d_i² numbers a side of a block for L_i, and d_i for λ_i.

    Raises:
        ValueError: an argument out of range, or with another `through`; from update, no later stage
            has such values, or other statistics stand between.
        TypeError: a flag that is no bool.
        TypeError: from init, for a parameter that is not a dense real floating tensor.

    Reference: Lin et al., arXiv 2509.03378; "ritz" as in NVIDIA-NeMo/Emerging-Optimizers.

    >>> import torch
    >>> from funshampoo import chain, in_eigenbasis, scale_by_adam
    >>> tx = chain(kl_statistics(0.5), in_eigenbasis(scale_by_adam(), every=1))
    >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     _, state = tx.update(w, state)
    >>> state["kl_statistics"].eigenvalues["w"][0]  # in a basis: largest last
    tensor([ 2.5500, 10.0500])
    """
    _check_decay(beta2, damping, through)
    check_range("initial_eigenvalue", initial_eigenvalue, 0.0, low_open=True)
    check_flags(bias_correction=bias_correction, weighted=weighted, normalized=normalized)
    check_flags(own_steps=own_steps, starts_whole=starts_whole, in_turn=in_turn)
    check_sides(sides)
    _check_least(through, least_eigenvalue)
    _check_kind(through, bias_correction, starts_whole=starts_whole, in_turn=in_turn)
    plain_sum = not weighted or is_exactly(beta2, 1)
    corrected = bias_correction and not plain_sum
    by_weight = corrected and own_steps  # an average and its weight decay alike
    options = {"least": least_eigenvalue, "in_turn": in_turn, "starts_whole": starts_whole}

    def init(params: Tree, *, block_ndim: int = 0) -> KlState:
        check_local(params, "kl_statistics")
        first = initial_eigenvalue if through == "eigenvalues" else None
        weights = first_weights(params, block_ndim, corrects=corrected, own_steps=own_steps)
        factors, eigenvalues = _first(params, block_ndim, sides, first)
        return KlState(KroneckerState(factors, weights), eigenvalues)

    def update(
        updates: Tree, state: KlState, params: Tree, context: Context
    ) -> tuple[Tree, KlState]:
        beta, ndim, donate = number(beta2, context.hyper), context.block_ndim, context.donate
        numbers = {"beta": beta, "damping": number(damping, context.hyper)}
        whitened = WHITENED[through](**numbers, **options)
        (factors, weight), eigenvalues = state
        kept, seen = _of_later_stage(context.later, through, updates)
        known = () if context.alive is None else (context.alive,)
        share = 1.0 if plain_sum else 1 - beta

        def accumulate(u: Tensor, g: Tensor, units: Any, n: Any, *rest: Any) -> tuple[Any, ...]:
            *fine, w, old, values = rest
            g = cast(g, compute_dtype(g))
            parts, values = whitened(Block(g, ndim, units, n, fine, w, old, values))
            by_row = len(fine) > 0 and not by_weight and not is_exactly(beta, 1)
            decay = kept_share(beta, fine[0], g) if by_row else beta

            def added(L: Any, x: Tensor) -> Any:
                if isinstance(L, tuple):
                    return L
                own = share / max(x.shape[-1], 1) if normalized else share
                return accumulated_factor(L, x, decay, own, donate)

            new = [added(L, unfold(x, i, ndim)) for i, (L, x) in enumerate(zip(old, parts))]
            return u, tuple(new), values

        source = updates if context.gradient is None else context.gradient
        inputs = (source, kept, seen, *known)
        weights = weights_over(weight, updates)
        with product_precision():
            _, factors, eigenvalues = update_leaves(
                accumulate, updates, (factors, eigenvalues), (*inputs, weights)
            )
        if corrected:
            weight = counted(updates, weight, beta, known, donate, own_steps)
        return updates, KlState(KroneckerState(factors, weight), eigenvalues)

    flops = functools.partial(kl_flops, through, sides)
    return GradientTransformation(init, update, numbers=[beta2, damping], flops=flops, passes=True)


def _check_decay(beta2: Hyper, damping: Hyper, through: str) -> None:
    check_range("beta2", beta2, 0.0, 1.0, high_open=through != "roots")
    check_range("damping", damping, 0.0)


def _check_least(through: str, least: Least) -> None:
    check_choice("through", through, ("eigenvalues", "ritz", "roots"))
    if not callable(least):
        check_range("least_eigenvalue", least, 0.0)
    if through == "ritz" and is_exactly(least, 0):
        raise ValueError(
            f'least_eigenvalue is {least}; with through="ritz" it must be above 0, since Ritz '
            "values may be 0: give 1e-8, say."
        )


def _check_kind(through: str, bias_correction: bool, **flags: bool) -> None:
    for name, flag in flags.items():
        if flag and through != "eigenvalues":
            raise ValueError(f'{name} stands with through="eigenvalues" alone: leave it out.')
    if flags["starts_whole"] and bias_correction:
        raise ValueError("starts_whole stands with bias_correction=False alone: give that too.")


def _first(
    params: Tree, block_ndim: int, sides: Sides | None, eigenvalue: float | None
) -> tuple[Tree, Tree]:
    """Factors of zeros, and eigenvalues, if there are to be any."""

    def factors(x: Tensor) -> tuple[Any, ...]:
        return zero_factors_of(x, block_ndim, wanted_sides(tuple(x.shape[block_ndim:]), sides))

    def eigenvalues(x: Tensor) -> tuple[Tensor, ...]:
        if eigenvalue is None:
            return ()
        lead, dtype = x.shape[:block_ndim], compute_dtype(x)
        return tuple(
            x.new_full((*lead, d), eigenvalue, dtype=dtype) for d in x.shape[block_ndim:] or (1,)
        )

    return map_leaves(factors, params), map_leaves(eigenvalues, params)


def _of_later_stage(later: tuple[Any, ...], through: Through, updates: Tree) -> tuple[Tree, Any]:
    """What the next such stage keeps, and a tree of the numbers of gradients it has seen, or of ().

    Raises:
        ValueError: there is none, it is of other statistics, that stand between, or a leaf is
            hidden from it.
    """
    wanted: Any = RefreshedState if through == "roots" else EigenbasisState
    stage = "root_inverse(...)" if through == "roots" else "in_eigenbasis(...)"
    # The bases of a later stage are no roots; and what comes after other statistics is of those.
    found: Any = first_state(later, (wanted, KroneckerState), closed=EigenbasisState)
    if isinstance(found, KroneckerState):
        raise ValueError(
            f'kl_statistics(through="{through}") is followed by other statistics, by which {stage} '
            f"goes: put its own {stage} between, or leave out one of the two."
        )
    try:
        bases = found if through == "roots" else found.bases
        kept = flatten(updates)[1].flatten_up_to(bases.kept)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f'kl_statistics(through="{through}") found no {stage} for its blocks: put it after it '
            f"in the same chain, as in chain(kl_statistics(...), {stage})."
            f"{_of_another(later, through)}"
        ) from error
    if MaskedNode in map(type, kept):
        raise hidden_error(kept, updates, f'kl_statistics(through="{through}")', stage)
    # Nobody counts for roots, for Ritz values and for bases that begin as the identity.
    counted = through == "eigenvalues" and found.seen != ()
    return bases.kept, found.seen if counted else map_leaves(lambda u: (), updates)


def _of_another(later: tuple[Any, ...], through: Through) -> str:
    """The remedy where the stage that another `through` reads stands there; else ""."""
    kind: Any = EigenbasisState if through == "roots" else RefreshedState
    if first_state(later, kind, closed=EigenbasisState) is None:
        return ""
    named = ("in_eigenbasis", "eigenvalues") if through == "roots" else ("root_inverse", "roots")
    return f' With the {named[0]}(...) that is there goes through="{named[1]}".'
