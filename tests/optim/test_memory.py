"""What a step holds beside what was there: no copies of all gradients at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import funshampoo as fs

SIDE, GROUPS = 128, 4
GRADIENT = 4 * SIDE * SIDE  # bytes of one in float32
CPU = torch.device("cpu")


def parameters(dtype: torch.dtype) -> list[Parameter]:
    found = [Parameter(torch.ones(SIDE, SIDE)) for _ in range(GROUPS)]
    for p in found:
        if dtype != p.dtype:
            p.grad_dtype = dtype
        p.grad = torch.ones(SIDE, SIDE, dtype=dtype)
    return found


def peak_of(step: Any) -> int:
    from benchmarks.memory import peak_bytes  # which takes a second to import

    step()
    return peak_bytes(step, CPU)


@pytest.mark.parametrize("method", [fs.sgd, fs.adamw, fs.shampoo], ids=lambda f: f.__name__)
def test_copies_of_gradients_are_made_group_by_group(method: Any) -> None:
    """To negate or cast them, once all groups were looked at."""
    kinds = [(torch.float32, True)]
    if hasattr(torch.Tensor, "grad_dtype"):  # before, a gradient has its parameter's dtype
        kinds += [(torch.bfloat16, False), (torch.bfloat16, True)]

    def peak(dtype: torch.dtype, maximize: bool) -> int:
        groups = [{"params": [p], "maximize": maximize} for p in parameters(dtype)]
        return peak_of(fs.Optimizer(groups, method, lr=0.1).step)

    plain = peak(torch.float32, False)
    assert plain >= GRADIENT
    for kind in kinds:
        assert peak(*kind) <= plain + 2 * GRADIENT


@pytest.mark.parametrize(
    "around",
    [lambda tx: tx, fs.in_tf32, lambda tx: fs.chain(tx, fs.identity())],
    ids=["bare", "in_tf32", "chain"],
)
def test_blocks_cast_what_they_step(around: Any) -> None:
    """Portion by portion, so that gradients of another dtype take no more than others."""
    tx = around(fs.shampoo(0.1, every=100, max_size=SIDE // 2, tile=SIDE * SIDE // 2))
    params = {f"p{i}": torch.ones(SIDE, SIDE) for i in range(GROUPS)}

    def peak(dtype: torch.dtype) -> int:
        grads, states = {n: torch.ones_like(p, dtype=dtype) for n, p in params.items()}, []
        states.append(tx.init(params))

        def step() -> None:
            states.append(fs.update_in_place(tx, grads, states.pop(), params))

        return peak_of(step)

    assert peak(torch.bfloat16) <= peak(torch.float32) + 0.1 * GRADIENT
