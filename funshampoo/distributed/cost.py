"""The cost per step of one block on its owner: the model for balancing ranks and plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from funshampoo.core.checks import check_count, check_range


class Seconds(NamedTuple):
    """Modelled seconds per step.

    Attributes:
        memory: elementwise stages, copies, and moving factor matrices and roots.
        products: matrix products, such as statistics and applying the roots.
        roots: refreshes, spread over the steps between two of them.
    """

    memory: float
    products: float
    roots: float

    @property
    def total(self) -> float:
        """The sum of all three."""
        return self.memory + self.products + self.roots


@dataclass(frozen=True)
class CostModel:
    """Modelled seconds per step of one block on the rank that owns it.

    For a block of sides d_1..d_k with n = d_1·…·d_k elements, refreshed every f steps:

        memory   = per_element·n + per_factor_element·Σ d_i²
        products = per_flop·flops
        roots    = c·Σ (root_cubic·d_i³ + root_quadratic·d_i² + root_constant) / f

    Sums are over the sides that are refreshed: `sides`, by default all. `flops` are what the stages
    of a method declare (`GradientTransformation.flops`), by default Shampoo's: 4n·Σ d_i, half of
    them for statistics and half for applying the roots. c is the refresh cost they declare
    (`GradientTransformation.refresh_cost`): 1 for the default solver, 0.8 for a QR. Every term is a
    sum of products of Python floats, so the same model gives the same bits on every rank.

    Attributes:
        per_element: seconds per element of the block.
        per_factor_element: seconds per element of a factor matrix. It dominates a step on vectors
            and thin blocks.
        per_flop: seconds per floating-point operation of a product.
        root_cubic, root_quadratic, root_constant: seconds per root, by powers of d.

    The default weights were measured by benchmarks/cost_model.py: float32, one CPU thread, torch
    2.13, the default solver. Whole steps took 0.85 to 1.5 times the modelled time. Only ratios
    matter for balance. A GPU's differ: measure them with `--device cuda`.

    Raises:
        ValueError, TypeError: a weight is negative or not a number.

    >>> cost = CostModel(1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    >>> cost.parts((2, 3), every=5)
    Seconds(memory=6.0, products=120.0, roots=7.0)
    >>> cost.block((2, 3), every=5, sides=(2,))
    55.6
    """

    per_element: float = 5.1e-9
    per_factor_element: float = 6.9e-10
    per_flop: float = 1.15e-11
    root_cubic: float = 9.5e-11
    root_quadratic: float = 4.2e-8
    root_constant: float = 1.2e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name), 0.0)

    def memory(self, block: Sequence[int], sides: Sequence[int] | None = None) -> float:
        """Seconds per step of everything that is memory-bound; `block` is a shape."""
        return self.per_element * math.prod(block) + self.per_factor_element * sum(
            side * side for side in (block if sides is None else sides)
        )

    def products(
        self, block: Sequence[int], sides: Sequence[int] | None = None, flops: float | None = None
    ) -> float:
        """Seconds per step of the arithmetic of products."""
        if flops is None:
            flops = 4 * math.prod(block) * sum(block if sides is None else sides)
        return self.per_flop * flops

    def roots(self, sides: Sequence[int]) -> float:
        """Seconds of one refresh: one root per side."""
        return sum(self.root(side) for side in sides)

    def root(self, d: int) -> float:
        """Seconds for the inverse root of one d×d matrix."""
        return self.root_cubic * d**3 + self.root_quadratic * d**2 + self.root_constant

    def parts(
        self,
        block: Sequence[int],
        every: int,
        sides: Sequence[int] | None = None,
        flops: float | None = None,
        refresh_cost: float = 1.0,
    ) -> Seconds:
        """Seconds per step, by category.

        Args:
            block: shape of the block, after merging and cutting.
            every: steps between two refreshes.
            sides: lengths of the sides that are refreshed; by default all.
            flops: of a step's products; by default Shampoo's with these sides.
            refresh_cost: per matrix, relative to the default solver.

        Raises:
            ValueError, TypeError: every is not an int of at least 1.
        """
        check_count("every", every)
        sides = block if sides is None else sides
        roots = refresh_cost * self.roots(sides) / every
        return Seconds(self.memory(block, sides), self.products(block, sides, flops), roots)

    def block(
        self,
        block: Sequence[int],
        every: int,
        sides: Sequence[int] | None = None,
        flops: float | None = None,
        refresh_cost: float = 1.0,
    ) -> float:
        """Total seconds per step: the sum of `parts` with the same arguments."""
        return self.parts(block, every, sides, flops, refresh_cost).total


DEFAULT_COST = CostModel()
"""The weights of one CPU thread."""

BY_SIZE = CostModel(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Number of elements only: for leaves that are stepped elementwise."""
