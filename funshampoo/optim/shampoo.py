"""Shampoo for code that was written for torch.optim."""

from __future__ import annotations

from typing import Any, Unpack

from funshampoo.core.contract import Hyper
from funshampoo.optim.optimizer import Optimizer
from funshampoo.optim.options import ShampooOptions
from funshampoo.recipes.shampoo import shampoo


class Shampoo(Optimizer):
    """`funshampoo.shampoo` as a torch.optim.Optimizer.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of them with hyperparameters.
        lr: learning rate; with grafting onto Adam, start from what AdamW likes.
        betas: decay of the gradient filter and of the statistics.
        epsilon: absolute damping; the default damping is relative, see `funshampoo.shampoo`.
        weight_decay: decoupled by default; weight_decay_kind= chooses another kind.
        momentum, nesterov: heavy-ball momentum on the preconditioned step.
        every: steps between two refreshes of the roots.
        max_size: longest side of a block.
        options: everything else that `funshampoo.shampoo` takes: grafting, stagger, solver,
            distribute=funshampoo.sharded for data-parallel ranks, compile=True, ...

    See `Optimizer` for groups, schedulers and checkpoints.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = Shampoo(model.parameters(), lr=0.01, weight_decay=1e-4)
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        betas: tuple[Hyper, Hyper] = (0.9, 0.99),
        epsilon: Hyper = 0.0,
        *,
        weight_decay: Hyper = 0.0,
        momentum: Hyper = 0.0,
        nesterov: bool = False,
        every: int = 10,
        max_size: int | None = 1024,
        **options: Unpack[ShampooOptions],
    ) -> None:
        super().__init__(
            params,
            shampoo,
            lr=lr,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            every=every,
            max_size=max_size,
            **options,
        )
