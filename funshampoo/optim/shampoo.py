"""Shampoo for code that was written for torch.optim, with typed options for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack

import torch

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.masks import Mask
from funshampoo.core.contract import Hyper
from funshampoo.linalg import Solver
from funshampoo.operators.exponents import Exponents, Sides
from funshampoo.optim.optimizer import Optimizer
from funshampoo.recipes.in_blocks import Distribute
from funshampoo.recipes.shampoo import Grafting, Vectors, shampoo
from funshampoo.transforms.weight_decay import DecayKind


class WrapperOptions(TypedDict, total=False):
    """Options that every `Optimizer` takes."""

    compile: bool | Mapping[str, Any]
    cuda_graph: bool
    tf32: bool
    stochastic_rounding: bool
    maximize: bool
    consolidate: bool
    accept_adamw: bool


class ShampooOptions(WrapperOptions, total=False):
    """Plus what `funshampoo.shampoo` takes besides the arguments of `Shampoo`; see there.

    With it, type checkers find `momentun=0.9`, or a string for a number, before anything runs. A
    test compares this with the recipe, name by name.
    """

    beta3: Hyper | Literal["nesterov"] | None
    relative_epsilon: Hyper
    start: int
    statistics_every: int
    merge: Merge
    keep: int
    grafting: Grafting
    grafting_beta2: Hyper | None
    grafting_epsilon: Hyper
    vectors: Vectors
    dampening: Hyper
    weight_decay_kind: DecayKind
    decay_through_momentum: bool
    peak_learning_rate: Hyper | None
    mask: Mask | None
    bias_correction: bool
    weighted: bool
    solver: Solver | None
    exponents: Exponents | None
    sides: Sides | None
    trace_scaling: Hyper | None
    initial_eigenvalue: float
    own_steps: bool
    stagger: bool
    basis_tolerance: Hyper | None
    product_dtype: torch.dtype | None
    packed: bool
    max_failures: int | None
    spike_factor: Hyper | None
    distribute: Distribute | None
    tile: TileSize


class Shampoo(Optimizer):
    """`funshampoo.shampoo` as a torch.optim.Optimizer.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of them with hyperparameters.
        lr: learning rate; with grafting onto Adam, start from the one that works for AdamW.
        betas: decay of the gradient filter and of the statistics.
        epsilon: absolute damping; the default damping is relative, see `funshampoo.shampoo`.
        weight_decay: decoupled by default; weight_decay_kind= selects another kind.
        momentum, nesterov: heavy-ball momentum on the preconditioned step.
        every: steps between two refreshes of the roots.
        max_size: longest side of a block.
        options: any other option of `funshampoo.shampoo`: grafting, stagger, solver,
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
