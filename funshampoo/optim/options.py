"""What `Shampoo` takes beside its own arguments, for type checkers.

They look up here what `shampoo` declares and the wrapper hands on: `momentun=0.9`, or a string for
a number, is found before anything runs. A test compares it with the recipe, name by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.masks import Mask
from funshampoo.core.contract import Hyper
from funshampoo.linalg import Solver
from funshampoo.operators.exponents import Exponents, Sides
from funshampoo.recipes.in_blocks import Distribute
from funshampoo.recipes.shampoo import Grafting, Vectors
from funshampoo.transforms.weight_decay import DecayKind


class WrapperOptions(TypedDict, total=False):
    """What every `Optimizer` takes."""

    compile: bool | Mapping[str, Any]
    maximize: bool
    consolidate: bool
    accept_adamw: bool


class ShampooOptions(WrapperOptions, total=False):
    """And what `funshampoo.shampoo` takes; see there."""

    beta3: Hyper | None
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
