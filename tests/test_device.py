"""Other devices than the CPU: nothing is made on the wrong one, nothing is read from it.

A meta tensor has a device of its own and no values: an operation that mixes it with a CPU tensor
of one or more axes raises, and so does reading it. So the meta device shows, without a GPU, that a
step stays on its device and never waits for it.
"""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from tests.table import CASES, Case
from tests.trees import assert_close, assert_equal, gradients, problem, tensors, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def to(tree: Any, device: str) -> Any:
    return optree.tree_map(lambda x: x.to(device), tree)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_stays_on_its_device_and_reads_nothing(case: Case) -> None:
    """Refreshes by coupled Newton alone ask the device whether they are done."""
    tx, params = case.make(), to(problem(), "meta")
    state = tx.init(params)
    by_newton = case.name == "root_newton"
    refresh = {"refresh": False} if by_newton else {}
    for g in gradients(3):
        updates, state = tx.update(to(g, "meta"), state, params, donate=True, **refresh)
        params = fs.apply_updates(params, updates)
        assert all(u.device.type == "meta" for u in tensors(updates))
    on_the_host = [x for x in tensors(state) if x.device.type == "cpu"]
    assert all(x.ndim == 0 for x in on_the_host)  # counters, and scheduled hyperparameters


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gpu_gives_the_numbers_of_the_cpu(case: Case) -> None:
    cpu, _, _ = train(case.make(), problem(), gradients(5), fs.apply_updates)
    grads = [to(g, "cuda") for g in gradients(5)]
    cuda, _, _ = train(case.make(), to(problem(), "cuda"), grads, fs.apply_updates)
    assert_close(to(cuda, "cpu"), cpu, 1e-8)


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plain_step_on_a_gpu_does_not_wait_for_it(case: Case) -> None:
    tx, params = case.make(), to(problem(), "cuda")
    state = tx.init(params)
    # The guards of the table look at their counters on every second step, and that waits.
    first, second, third = (to(g, "cuda") for g in gradients(3))
    _, state = tx.update(first, state, params)
    _, state = tx.update(second, state, params, refresh=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tx.update(third, state, params, refresh=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_an_ensemble_on_a_gpu_with_a_schedule() -> None:
    tx = fs.shampoo(fs.schedules.cosine(0.1, 10), every=2)
    params = optree.tree_map(lambda x: torch.stack([x, 2 * x]), to(problem(), "cuda"))
    state = vmap(tx.init)(params)
    for g in gradients(3):
        stacked = optree.tree_map(lambda x: torch.stack([x, x]), to(g, "cuda"))
        updates, state = vmap(tx.update)(stacked, state, params)
        params = fs.apply_updates(params, updates)
    first, _, _ = train(tx, problem(), gradients(3), fs.apply_updates)
    assert_close(optree.tree_map(lambda x: x[0].cpu(), params), first, 1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_default_device_changes_nothing(case: Case) -> None:
    """Tensors are made where the parameters are, counters on the CPU."""
    expected = train(case.make(), problem(), gradients(5), fs.apply_updates)
    params, grads = problem(), gradients(5)
    torch.set_default_device("meta")
    try:
        found = train(case.make(), params, grads, fs.apply_updates)
    finally:
        torch.set_default_device(None)
    assert_equal(found, expected)
