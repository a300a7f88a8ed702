"""What older releases of torch get wrong by themselves: docs/torch.md has the list."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

MESSAGE = "an error raised in a graph loses its message"


def wrong_before(release: str, why: str, where: bool = True) -> None:
    """Skips the test that calls it, before this release of torch and where the fault shows."""
    if where and TorchVersion(torch.__version__) < release:
        pytest.skip(f"torch before {release}: {why}")
