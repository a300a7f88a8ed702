"""No waste: how many operators a plain step takes, and that it waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs

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
