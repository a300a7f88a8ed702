"""What a step asks of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
