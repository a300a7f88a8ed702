"""What the fingerprints are of: the bits of tensors, and chains in words."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.distributed.agreement import bits_of, fingerprint_of
from funshampoo.distributed.described import described


def test_bits_are_exact_in_any_order_and_tell_zeros_apart() -> None:
    x = torch.randn(7, 5)
    assert bits_of([x, x.T, None]) == [bits_of([x])[0]] * 2 + [-1]
    assert bits_of([x])[0] == int(x.view(torch.int32).long().sum())
    assert bits_of([torch.zeros(3)]) != bits_of([-torch.zeros(3)])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        y = x.to(dtype)
        assert bits_of([y]) != bits_of([y + 1])
    assert bits_of([torch.zeros(0), torch.tensor(0.0)]) == [0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"every": 5},
        {"start": 2},
        {"beta1": 0.5},
        {"epsilon": 1e-3},
        {"relative_epsilon": 1e-4},
        {"grafting": "sgd"},
        {"grafting_epsilon": 1e-3},
        {"vectors": "blocks"},
        {"nesterov": True},
        {"weight_decay": 0.5},
        {"bias_correction": False},
        {"solver": fs.linalg.newton_schulz()},
        {"exponents": {2: 0.5}},
        {"basis_tolerance": 0.1},
        {"packed": True},
        {"product_dtype": torch.bfloat16},
        {"learning_rate": 0.02},
    ],
    ids=str,
)
def test_a_description_has_every_number(options: dict[str, Any]) -> None:
    common = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    plain, other = (described(fs.shampoo(**(common | x))) for x in ({}, options))
    assert plain == described(fs.shampoo(**common))
    assert fingerprint_of(plain) == fingerprint_of(described(fs.shampoo(**common)))
    assert fingerprint_of(plain) != fingerprint_of(other)


@pytest.mark.parametrize("name", ["lr", "warmup_steps"])
def test_numbers_of_a_schedule_made_of_others_are_told(name: str) -> None:
    args = {"lr": 0.5, "warmup_steps": 5}
    found = [described(fs.from_published("SGDScheduleFree", **args)) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] != described(fs.from_published("SGDScheduleFree", **{**args, name: 6}))


def test_of_a_users_function_only_the_name_is_told() -> None:
    """What it has closed over may well differ from rank to rank."""

    def stage(rank: int) -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            print(rank)
            return updates, state

        return fs.GradientTransformation(lambda params: fs.EmptyState(), update)

    assert described(fs.chain(stage(0), fs.trace(0.9))) == described(
        fs.chain(stage(1), fs.trace(0.9))
    )


def nested(x: float, rank: int) -> float:
    return x * (1 + 0 * rank)


def test_what_a_users_partial_or_dataclass_holds_is_not_told() -> None:
    """Nor does a function without a module stop anybody."""

    @dataclasses.dataclass(frozen=True)
    class Solver:
        rank: int

        def __call__(self, A: Any, p: float, epsilon: Any) -> Any:
            return fs.linalg.eigh()(A, p, epsilon)

    def of(rank: int) -> Any:
        rate = functools.partial(nested, rank=rank)
        return described(fs.shampoo(rate, solver=Solver(rank)))

    assert of(0) == of(1)
    made: dict[str, Any] = {}
    exec("def rate(count): return 0.1", made)
    made["rate"].__module__ = None
    assert described(fs.scale_by_learning_rate(made["rate"]))
