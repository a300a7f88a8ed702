"""Gradient clipping by value."""

from __future__ import annotations

from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, number
from funshampoo.core.tree import update_columns
from funshampoo.operators.columns import Column, clamp, in_compute_dtype


def clip(max_value: Hyper) -> GradientTransformation:
    """Clip by value: U ← min(max(U, -max_value), max_value), entry by entry.

    Raises:
        ValueError: max_value is a number that is not above 0.

    >>> import torch
    >>> clip(1.0).update({"w": torch.tensor([0.5, -3.0])}, ())[0]
    {'w': tensor([ 0.5000, -1.0000])}
    """
    check_range("max_value", max_value, 0.0, low_open=True, infinite=True)

    def clipped(updates: Tree, *, hyper: Numbers = NO_NUMBERS) -> Tree:
        limit = number(max_value, hyper)

        def clamped(u: Column) -> tuple[Column]:
            return (clamp(in_compute_dtype(u), limit),)

        return update_columns(clamped, updates, ())[0]

    return stateless(clipped, "clip", numbers=[max_value], elementwise=True)
