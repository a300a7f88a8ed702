"""The methods that the tests of the mechanism train, and what they train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg
from tests.refresh.clients import in_eigenbasis, kl_shampoo
from tests.trees import clone

D = torch.float64
SHAPES = {"m": (6, 5), "t": (3, 2, 4), "v": (5,), "w": (4, 6), "x": (3, 2, 1, 2)}
START, EVERY, STEPS = 6, 3, 18  # by step 6 the statistics have full rank


def gradient(t: int, shapes: Any = SHAPES, **missing: int) -> Any:
    """No gradient for the first steps of those that are `missing`."""
    generator = torch.Generator().manual_seed(t)
    drawn = {k: torch.randn(shape, generator=generator, dtype=D) for k, shape in shapes.items()}
    return {k: None if t <= missing.get(k, -1) else g for k, g in drawn.items()}


def soap(**options: Any) -> fs.GradientTransformation:
    inner = fs.scale_by_adam(0.9, 0.95, 1e-3)
    options = {"every": EVERY, "start": START} | options
    return fs.chain(fs.kronecker_statistics(0.9), in_eigenbasis(inner, **options))


def kl(**options: Any) -> fs.GradientTransformation:
    return fs.chain(kl_shampoo(0.9, **{"every": EVERY, "start": START} | options))


def shampoo(**options: Any) -> fs.GradientTransformation:
    options = {"every": EVERY, "start": START} | options
    solver = linalg.eigh(relative_epsilon=1e-3)
    return fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(solver=solver, **options))


METHODS: dict[str, Callable[..., fs.GradientTransformation]] = {
    "soap": soap,
    "kl": kl,
    "shampoo": shampoo,
    "newton": lambda **options: fs.chain(
        fs.kronecker_statistics(0.9),
        fs.root_inverse(solver=linalg.newton_schulz(), **{"every": EVERY} | options),
    ),
    "adaptive": lambda **options: shampoo(**{"basis_tolerance": 0.3} | options),
}
every_method = pytest.mark.parametrize("method", METHODS)


def run(tx: Any, grads: list[Any], **context: Any) -> tuple[list[Any], Any]:
    params = {k: torch.zeros(shape, dtype=D) for k, shape in SHAPES.items()}
    state, history = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params, **context)
        history.append(clone(updates))
    return history, state
