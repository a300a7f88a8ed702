"""What a step asks of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import funshampoo as fs
from funshampoo.core.modes import are_apart, full_precision

STEPS = """
import resource
import torch
import funshampoo as fs

params = {"w": torch.zeros(5 * 256, 2 * 256)}
grads = {"w": torch.randn(5 * 256, 2 * 256)}
tx = fs.shampoo(1e-3, max_size=256, every=1000)
state = tx.init(params)

def faults(steps):
    global state
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        state = fs.update_in_place(tx, grads, state, params)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(12)  # until the heap has found its size
print(faults(10) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")
def test_a_plain_step_pays_no_page_faults() -> None:
    """A dozen temporaries of 640 pages each are in memory that the step before has used."""
    run = [sys.executable, "-c", STEPS]
    found = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert float(found.stdout) < 200


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("tx", [fs.sgd(1.0), fs.blocked(fs.scale(-1.0), 2)])
def test_tied_leaves_get_both_updates(
    tx: fs.GradientTransformation, on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one kernel would add both at once, they are added one by one."""
    apart: list[bool] = []

    def as_on_a_gpu(tensors: list[torch.Tensor], blocks: bool = False) -> bool:
        apart.append(are_apart(tensors) and len({x.data_ptr() for x in tensors}) == len(tensors))
        return apart[-1]

    if on_a_gpu:
        monkeypatch.setattr("funshampoo.core.applying.are_apart", as_on_a_gpu)
        monkeypatch.setattr("funshampoo.blocks.regions.are_apart", as_on_a_gpu)
    w = torch.ones(4)
    params = {"a": w, "b": w}
    grads = {"a": torch.full((4,), 0.25), "b": torch.full((4,), 0.5)}
    fs.update_in_place(tx, grads, tx.init(params), params)
    assert w.tolist() == [0.25] * 4
    assert apart == [False] * on_a_gpu


def test_tensors_of_one_place() -> None:
    x = torch.empty(2)
    assert are_apart([x, x])  # a CPU writes to one after the other
    fake = torch.empty(2, device="meta")
    assert are_apart([fake, fake])  # which is nowhere


def test_full_precision_ends_autocast_of_every_kind_and_puts_it_back() -> None:
    kinds = ("cpu", "cuda")
    for kind in kinds:
        torch.set_autocast_enabled(kind, True)
    try:
        with full_precision():
            assert not any(torch.is_autocast_enabled(kind) for kind in kinds)
        assert all(torch.is_autocast_enabled(kind) for kind in kinds)
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
