"""No waste: how many operators a plain step takes, and that it waits for nothing."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.plan.planner import meta_parameters
from tests.traffic import Traffic
from tests.trees import gradients, problem, tensors

READS_A_VALUE = ("_local_scalar_dense", "is_nonzero", "nonzero", "item")


class Operators(TorchDispatchMode):
    """Counts operators, and those that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        reads = any(name in str(function) for name in READS_A_VALUE)
        self.reads += reads and args[0].dtype != torch.int64  # counters live on the CPU
        return function(*args, **(kwargs or {}))


def operators_of_a_plain_step(
    params: dict[str, torch.Tensor], in_place: bool = False, **options: Any
) -> Operators:
    tx = fs.shampoo(0.1, max_size=40, weight_decay=0.1, momentum=0.9, **options)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    state = tx.init(params)
    for _ in range(2):  # a refresh, and a plain step
        with Operators() as seen:
            if in_place:
                state = fs.update_in_place(tx, grads, state, params)
            else:
                _, state = tx.update(grads, state, params, donate=True)
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True, "grafting": "rms"}, {"in_place": True}], ids=str
)
def test_operators_do_not_grow_with_the_number_of_blocks(options: dict[str, Any]) -> None:
    few = {f"w{i}": torch.randn(40, 40) for i in range(100)}
    many = {f"w{i}": torch.randn(40, 40) for i in range(1000)}
    cut = {"w": torch.randn(400, 400)}
    counts = {len(p): operators_of_a_plain_step(p, **options).count for p in (few, many, cut)}
    assert counts[100] == counts[1000] <= 120, counts
    assert counts[1] <= 120, counts


def test_a_plain_step_reads_nothing_but_the_guards_verdict() -> None:
    """One bool for all stacks, on the CPU, where no one waits for it; on a device: test_device."""
    params = {"w": torch.randn(40, 40), "v": torch.randn(30)}
    assert operators_of_a_plain_step(params).reads == 1


@pytest.mark.parametrize(
    ("model", "bytes_of_parameters", "operators"), [("gpt2", 56, 290), ("resnet-50", 61, 400)]
)
def test_traffic_and_launches_of_a_plain_step(
    model: str, bytes_of_parameters: float, operators: int
) -> None:
    params = meta_parameters(model, torch.float32)
    grads = {name: torch.empty_like(p) for name, p in params.items()}
    tx = fs.shampoo(0.1, max_size=1024, vectors="blocks")
    state = tx.init(params)
    with Traffic() as seen:
        fs.update_in_place(tx, grads, state, params, refresh=False)
    assert seen.bytes <= bytes_of_parameters * sum(p.nbytes for p in params.values())
    assert seen.operators <= operators


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_size": 4, "momentum": 0.9, "weight_decay": 0.1},
        {"grafting": "rms", "beta3": 0.8},
        {"packed": True, "basis_tolerance": 0.1},
        {"tile": 20, "max_size": 3},
    ],
    ids=str,
)
def test_a_donated_step_keeps_every_address(options: dict[str, Any], refresh: bool) -> None:
    """So that a CUDA graph can replay a plain one."""
    tx, params = fs.shampoo(0.1, **options), problem()
    state = tx.init(params)
    for g in gradients(3):
        before = [(x.data_ptr(), x.shape) for x in tensors(state)]
        state = fs.update_in_place(tx, g, state, params, refresh=refresh)
        assert [(x.data_ptr(), x.shape) for x in tensors(state)] == before


def test_runs_that_are_dropped_leave_nothing() -> None:
    """With every option; the second thirty hold what the first did."""
    options: list[dict[str, Any]] = [
        {},
        {"stagger": True},
        {"basis_tolerance": 0.1, "packed": True},
        {"momentum": 0.9, "weight_decay": 0.1, "max_size": 3},
        {"solver": fs.linalg.newton_schulz(), "vectors": "blocks"},
    ]
    grads = gradients(2)

    def run(i: int) -> None:
        params = problem()
        tx = fs.shampoo(0.1, every=2, **options[i % len(options)])
        state = tx.init(params)
        for g in grads:
            state = fs.update_in_place(tx, g, state, params)
        optimizer = fs.Shampoo([torch.nn.Parameter(torch.ones(3, 2))], every=2)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
        optimizer.step()

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    for i in range(30):
        run(i)
    first = held()
    for i in range(30):
        run(i)
    assert held() <= first
