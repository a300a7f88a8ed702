"""SPlus as a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from funshampoo.blocks.layout import Merge
from funshampoo.combinators.chaining import chain
from funshampoo.core.checks import check_count, check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Basis, eigh
from funshampoo.recipes.in_blocks import Distribute
from funshampoo.recipes.routing import whole
from funshampoo.transforms import (
    decay_after_step,
    ema,
    in_eigenbasis,
    kronecker_statistics,
    scale_by_learning_rate,
    scale_by_shape,
    sign,
    tail_average,
)


def splus(
    learning_rate: Hyper | Schedule = 0.1,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    average: Hyper = 0.999,
    weight_decay: Hyper = 1e-2,
    every: int = 100,
    basis: Basis | None = None,
    max_side: int = 10_000,
    others_scale: float = 1e-3,
    merge: Merge = "none",
    max_failures: int | None = 20,
    distribute: Distribute | None = None,
) -> GradientTransformation:
    """SPlus: signs in the eigenbases of Shampoo's factor matrices; evaluate with an average.

        M ← beta1 M + (1 - beta1) G,   L_i ← beta2 L_i + (1 - beta2) mat_i(G) mat_i(G)ᵀ
        U = Q_1 sign(Q_1ᵀ M Q_2) Q_2ᵀ
        s = 2 learning_rate / (r + c) for a matrix,   others_scale learning_rate for the rest
        W ← W - s U,   x ← the average of W,   W ← (1 - s weight_decay) W
        on a refresh:   Q_i ← the eigenvectors of L_i; Q_i = I on the first step

    What is not a matrix steps along sign(M). Evaluate the model with x, which is
    `funshampoo.evaluation_parameters(state, params)`. Defaults are those of kvfrans/splus.

    State beside AdamW's two numbers per weight, for a matrix r×c: 2 r² + 2 c²; the second number is
    x. A step beside it: r² c + r c² multiplications into the bases, as many back and as many for
    the statistics, and one eigendecomposition per side every 100 steps.

    Use it with large learning rates and rare refreshes: no step is longer than the rate, however
    old the bases are. On large matrices rates are hundreds of times AdamW's, as s has 2/(r + c).

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1, beta2: of the momentum and of the factor matrices.
        average: decay of x.
        weight_decay: λ ≥ 0, for all parameters, applied after the step; see `decay_after_step`.
        every, basis: when and how the bases are renewed; see `in_eigenbasis`. By default with
            `linalg.eigh()`.
        max_side: a longer side is left alone, and its matrix takes steps scaled by others_scale.
        others_scale: the length of steps for everything that is not a matrix.
        merge: `blocks.Stacked(...)` if a leaf is a stack of matrices, or several in one; see
            `blocked`. "none": each leaf is one block.
        max_failures, distribute: as in `shampoo`; the unit that a rank owns is a whole parameter.

    Raises:
        ValueError, TypeError: an argument out of range, named.

    Reference: Frans et al., arXiv 2506.07254.

    >>> import torch
    >>> tx = splus(0.4, weight_decay=0.0)
    >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
    >>> grads = {"w": torch.tensor([[5.0, -1.0], [0.0, 2.0]]), "b": torch.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates["w"], updates["b"]
    (tensor([[-0.2000,  0.2000],
            [-0.0000, -0.2000]]), tensor([-0.0004]))
    """
    check_range("average", average, 0.0, 1.0, high_open=True)
    check_count("max_side", max_side)
    check_range("others_scale", others_scale, 0.0)

    stages = signs_in_eigenbases(
        learning_rate,
        beta1=beta1,
        beta2=beta2,
        average=average,
        weight_decay=weight_decay,
        every=every,
        basis=basis,
        is_kept=lambda d: d <= max_side,
        max_side=max_side,
        others_scale=others_scale,
    )
    return whole(chain(*stages), max_failures, distribute, merge)


def signs_in_eigenbases(
    learning_rate: Hyper | Schedule,
    *,
    beta1: Hyper,
    beta2: Hyper,
    average: Hyper,
    weight_decay: Hyper,
    every: int,
    basis: Basis | None,
    is_kept: Callable[[int], bool],
    max_side: float,
    others_scale: float,
) -> list[GradientTransformation]:
    """The stages of `splus`; `is_kept` says which sides have factor matrices."""

    def sides(shape: tuple[int, ...]) -> Sequence[bool]:
        return [len(shape) == 2 and is_kept(d) for d in shape]

    def scale(shape: tuple[int, ...]) -> float:
        square = len(shape) == 2 and max(shape) <= max_side
        return 2 / sum(shape) if square else others_scale

    return [
        kronecker_statistics(beta2, bias_correction=False, sides=sides),
        ema(beta1, bias_correction=False),
        in_eigenbasis(sign(), every, basis=eigh() if basis is None else basis, first="identity"),
        scale_by_shape(scale),
        scale_by_learning_rate(learning_rate),
        tail_average(beta=average),
        decay_after_step(weight_decay, learning_rate, scale=scale),
    ]
