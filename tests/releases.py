"""What torch 2.8 gets wrong by itself, as docs/torch.md lists it: tests of that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

MESSAGE = "an error raised in a graph loses its message"

OLD = TorchVersion(torch.__version__) < "2.9"


def wrong_in_28(why: str, where: bool = True) -> None:
    """Skips the test that calls it, on 2.8 and where the fault shows."""
    if OLD and where:
        pytest.skip(f"torch 2.8: {why}")
