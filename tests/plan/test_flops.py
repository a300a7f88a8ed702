"""What stages state of their products, against what torch counts on a step.

Of vectors it counts nothing: a product with one is a pass over the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funshampoo as fs
from funshampoo.distributed.ownership import works_of
from funshampoo.operators.exponents import chosen_sides
from funshampoo.plan.scopes import scopes_of

SHAPES: dict[str, tuple[int, ...]] = {
    "w": (48, 32),
    "other": (48, 32),
    "kernel": (16, 8, 4),
    "tall": (96, 16),
    "b": (48,),
    "s": (),
}


def of_matrices(block: tuple[int, ...]) -> list[bool]:
    return [len(block) > 1] * len(block)


def in_bases(
    inner: fs.GradientTransformation, sides: Any = of_matrices
) -> list[fs.GradientTransformation]:
    statistics = fs.kronecker_statistics(sides=chosen_sides("diagonal", sides))
    return [statistics, fs.in_eigenbasis(inner, 100)]


STEP = 5  # which refreshes nothing, and is no multiple of 2 or 3
TRANSFORMATIONS: dict[str, Callable[[], fs.GradientTransformation]] = {
    "shampoo": lambda: fs.shampoo(0.1, every=100),
    "cut": lambda: fs.shampoo(0.1, every=100, max_size=32, merge="none"),
    "one_sided": lambda: fs.shampoo(0.1, every=100, sides="smaller"),
    "one_exponent": lambda: fs.shampoo(0.1, every=100, exponents={2: {0: 0.0}}),
    "soap": lambda: fs.soap(0.1, every=100),
    "eigenvalue_shampoo": lambda: fs.eigenvalue_shampoo(0.1, every=100),
    "first_moment_off": lambda: fs.eigenvalue_shampoo(0.1, beta1=0.0, every=100),
    "third_turn_one_sided": lambda: fs.blocked(
        fs.chain(fs.ema(), *in_bases(fs.scale_by_adam(), sides="smaller")), 64
    ),
    "gradient_unread": lambda: fs.blocked(fs.chain(fs.ema(), *in_bases(fs.trace())), 64),
    "changed_in_a_chain": lambda: fs.blocked(
        fs.chain(fs.chain(fs.trace()), fs.chain(*in_bases(fs.scale_by_adam()))), 64
    ),
    "changed_outside": lambda: fs.chain(
        fs.ema(), fs.blocked(fs.chain(*in_bases(fs.scale_by_adam())), 64)
    ),
    "every_step": lambda: fs.blocked(
        fs.chain(fs.ema(), fs.every_k(fs.chain(*in_bases(fs.scale_by_adam())), 1)), 64
    ),
    "soap_one_sided": lambda: fs.soap(0.1, every=100, sides="smaller"),
    "muon": lambda: fs.muon(0.1),
    "muon_gram": lambda: fs.blocked(fs.orthogonalize(gram=True, vectors="pass"), None),
    "experts": lambda: fs.blocked(
        fs.orthogonalize("cans", flatten_sides=False, vectors="pass"), None, merge="none"
    ),
    "normuon": lambda: fs.normuon(0.1),
    "spectral_descent": lambda: fs.spectral_descent(0.1, polynomials="polar_express", steps=3),
    "kl_shampoo": lambda: fs.kl_shampoo(0.1, every=100),
    "kl_soap": lambda: fs.kl_soap(0.1, every=100),
    "kl_roots": lambda: fs.blocked(
        fs.chain(
            fs.kl_statistics(0.9, through="roots", sides=of_matrices),
            fs.root_inverse(100, sides=of_matrices),
        ),
        64,
    ),
    "kl_ritz": lambda: fs.blocked(
        fs.chain(
            fs.kl_statistics(0.9, through="ritz", least_eigenvalue=1e-6, sides=of_matrices),
            fs.in_eigenbasis(fs.scale_by_adam(), 100),
        ),
        64,
    ),
    "splus": lambda: fs.splus(0.1, every=100),
    "soap_muon": lambda: fs.soap_muon(0.1, every=100),
    "lion": lambda: fs.blocked(fs.lion(0.1), None),
}


def counted(tx: fs.GradientTransformation, step: int) -> tuple[int, float]:
    """Operations of this step's products as torch counts them, and as the stages state them."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state = tx.init(params)
    for _ in range(step - 1):
        _, state = tx.update(params, state, params)
    counter = FlopCounterMode(display=False)
    with counter:
        tx.update(params, state, params)
    scopes = scopes_of(tx, state, params)
    stated = [s.works[name].flops * b.rows for s in scopes for name, b in s.blocks.items()]
    return counter.get_total_flops(), math.fsum(stated)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_plain_step_multiplies_as_much_as_its_stages_state(name: str) -> None:
    found, stated = counted(TRANSFORMATIONS[name](), STEP)
    assert found == stated
    assert (found > 0) == (name != "lion")


@pytest.mark.parametrize(
    "stage",
    [
        fs.kronecker_statistics(every=4, exponents={0: 0.0, 1: 0.0}),
        fs.every_k(fs.orthogonalize(vectors="pass"), 4),
    ],
)
def test_what_happens_on_some_steps_is_spread_over_all(stage: fs.GradientTransformation) -> None:
    """The mean of an interval."""
    tx = fs.blocked(stage, None)
    pairs = [counted(tx, step) for step in (4, 5, 6, 7)]
    assert [found > 0 for found, _ in pairs] == [True, False, False, False]
    assert sum(found for found, _ in pairs) / 4 == pairs[0][1]


def test_a_stage_of_your_own_states_its_products() -> None:
    """And a combinator of your own, those of what is in it."""

    def doubled() -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            return updates, state

        return fs.GradientTransformation(
            lambda params: (), update, flops=lambda block, kept: 10.0 * len(block) + len(kept)
        )

    inner = fs.chain(fs.kronecker_statistics(), doubled(), fs.root_inverse())
    tx = fs.blocked(fs.wrapping(inner, lambda run, updates, own: (run(updates), own)), None)
    state = tx.init({"w": torch.zeros(3, 2)})
    work = works_of(tx, {"3x2": (3, 2)}, state)["3x2"]
    assert work == ((3, 2), 2 * 2 * 6 * (3 + 2) + 20 + 2, 1.0)
