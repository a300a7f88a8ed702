"""A step on a GPU neither mixes devices nor waits for one, whatever the transformation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch, 2.8 say, registers no backend that is written in Python",
)


def report(*names: str) -> str:
    """Of the cases of these names, or of all."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.fake_accelerator", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=900, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stdout or done.stderr
    return done.stdout


@pytest.mark.slow  # a whole program
def test_recipes_step_where_their_tensors_are() -> None:
    assert report("shampoo", "kl_soap", "muon") == "3 cases\n"


@pytest.mark.slow
def test_every_transformation_steps_where_its_tensors_are() -> None:
    report()
