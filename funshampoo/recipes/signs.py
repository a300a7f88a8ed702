"""Methods that step along signs."""

from __future__ import annotations

from typing import Literal

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.recipes.in_blocks import Distribute, by_leaves
from funshampoo.recipes.routing import decay
from funshampoo.transforms import ema, sign


def lion(
    learning_rate: Hyper | Schedule = 1e-4,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.99,
    weight_decay: Hyper = 0.0,
    distribute: Distribute | None = None,
    guard: bool = False,
) -> GradientTransformation:
    """Lion: the sign of a momentum that looks ahead.

        W ← W - learning_rate (sign(beta1 M + (1 - beta1) G) + weight_decay W)
        M ← beta2 M + (1 - beta2) G

    Defaults are those of google/automl. A non-finite gradient enters M, as there, unless `guard` is
    set.

    State: one number per entry, half of AdamW's. Time: only elementwise operations. Use it if
    memory is short and batches are large; learning rates are three to ten times smaller than
    AdamW's, decay larger by the same factor.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1, beta2: decay of the look-ahead and of M, in [0, 1): beta3 and beta1 of `ema`.
        weight_decay: λ ≥ 0, decoupled.
        distribute: `funshampoo.sharded`, to shard the leaves over data-parallel ranks, whole leaves
            by size; as in `shampoo`.
        guard: hold a leaf whose gradient is not finite: guarded(..., by_leaf=True) around the
            chain. After 20 times in a row it raises FailureLimitError.

    Raises:
        ValueError: an argument out of range.

    Reference: Chen et al., arXiv 2302.06675.

    >>> import torch
    >>> tx = lion(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    check_range("beta1", beta1, 0.0, 1.0, high_open=True)  # which `ema` has by other names
    check_range("beta2", beta2, 0.0, 1.0, high_open=True)
    stages = [ema(beta2, beta1, bias_correction=False), sign(), *decay(weight_decay)]
    return by_leaves(stages, learning_rate, distribute, guard)


def sign_descent(
    learning_rate: Hyper | Schedule = 1e-2,
    *,
    beta1: Hyper = 0.9,
    scale: Hyper | Literal["mean", "sum"] | None = None,
    weight_decay: Hyper = 0.0,
    distribute: Distribute | None = None,
    guard: bool = False,
) -> GradientTransformation:
    """Sign descent with momentum (signum): every entry moves equally far.

        M ← beta1 M + (1 - beta1) G,   M̂ = M / (1 - beta1^t)
        W ← W - learning_rate (s sign(M̂) + weight_decay W)

    Defaults are those of SignDescentPreconditionerConfig of facebookresearch/optimizers. A
    non-finite gradient enters M, unless `guard` is set.

    State: one number per entry, half of AdamW's. Time: only elementwise operations. Use it to see
    what remains of AdamW without its second moment.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1: see `ema`.
        scale: s, from M̂; see `sign`. "sum" is the steepest descent under the norm max |W_ij|.
        weight_decay: λ ≥ 0, decoupled.
        distribute: `funshampoo.sharded`, to shard the leaves over data-parallel ranks, whole leaves
            by size; as in `shampoo`.
        guard: hold a leaf whose gradient is not finite: guarded(..., by_leaf=True) around the
            chain. After 20 times in a row it raises FailureLimitError.

    Raises:
        ValueError: an argument out of range.

    Reference: Bernstein et al., arXiv 1802.04434.

    >>> import torch
    >>> tx = sign_descent(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    stages = [ema(beta1), sign(scale), *decay(weight_decay)]
    return by_leaves(stages, learning_rate, distribute, guard)
