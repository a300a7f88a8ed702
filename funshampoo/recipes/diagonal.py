"""The standard diagonal baselines, from the same parts."""

from __future__ import annotations

from torch import Tensor

from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_flags
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.live import initial, is_exactly
from funshampoo.recipes.in_blocks import Distribute, by_leaves
from funshampoo.transforms import add_decayed_weights, scale_by_adam, trace


def adamw(
    learning_rate: Hyper | Schedule = 1e-3,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    epsilon: Hyper = 1e-8,
    nesterov: bool = False,
    weight_decay: Hyper = 1e-2,
    mask: Mask | None = None,
    distribute: Distribute | None = None,
    guard: bool = False,
) -> GradientTransformation:
    """AdamW: `scale_by_adam`, decoupled weight decay, learning rate.

    Matches torch.optim.AdamW, and has its defaults. As there, a non-finite gradient enters, unless
    `guard` is set.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        beta1, beta2, epsilon, nesterov: as in `scale_by_adam`. With nesterov this is NAdamW.
        weight_decay: λ ≥ 0.
        mask: which leaves decay.
        distribute: `funshampoo.sharded`, to shard the leaves over data-parallel ranks, whole leaves
            by size; as in `shampoo`.
        guard: hold a leaf whose gradient is not finite: guarded(..., by_leaf=True) around the
            chain. After 20 times in a row it raises FailureLimitError.

    Raises:
        ValueError: an argument out of range.

    Reference: Loshchilov and Hutter, arXiv 1711.05101.

    >>> import torch
    >>> tx = adamw(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
    {'w': tensor([-0.1010])}
    """
    adam = scale_by_adam(beta1, beta2, epsilon, nesterov=nesterov)
    stages = [adam, add_decayed_weights(weight_decay, mask)]
    return by_leaves(stages, learning_rate, distribute, guard)


def sgd(
    learning_rate: Hyper | Schedule,
    *,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    distribute: Distribute | None = None,
    guard: bool = False,
) -> GradientTransformation:
    """SGD with momentum: coupled weight decay, `trace`, learning rate.

    Matches torch.optim.SGD; as there, the first step is not damped. As there, a non-finite gradient
    enters, unless `guard` is set.

    Args:
        learning_rate: number, tensor, or schedule of the old step count.
        momentum, nesterov, dampening: as in `trace`. The number 0 for momentum leaves it out.
        weight_decay: λ ≥ 0, an L2 penalty: it is added to the gradient.
        mask: which leaves decay.
        distribute: `funshampoo.sharded`, to shard the leaves over data-parallel ranks, whole leaves
            by size; as in `shampoo`.
        guard: hold a leaf whose gradient is not finite: guarded(..., by_leaf=True) around the
            chain. After 20 times in a row it raises FailureLimitError.

    Raises:
        ValueError: an argument out of range; nesterov without momentum, or with dampening.

    Reference: Sutskever et al., ICML 2013.

    >>> import torch
    >>> tx = sgd(0.1, momentum=0.9, nesterov=True)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
    {'w': tensor([-0.1900])}
    """
    check_flags(nesterov=nesterov)
    damped = not isinstance(initial(dampening), Tensor) and not is_exactly(dampening, 0)
    if nesterov and (is_exactly(momentum, 0) or damped):
        raise ValueError("nesterov needs momentum above 0 and dampening 0.")
    stages = []
    if not is_exactly(weight_decay, 0):
        stages.append(add_decayed_weights(weight_decay, mask, kind="coupled"))
    heavy_ball = trace(momentum, nesterov=nesterov, dampening=dampening, dampen_first_step=False)
    if not is_exactly(momentum, 0):
        stages.append(heavy_ball)
    return by_leaves(stages, learning_rate, distribute, guard)
