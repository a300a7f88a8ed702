"""Custom operators, which torch.compile leaves as they are in a graph.

Inductor has no product that accumulates into a graph input: it turns baddbmm_ into a copy of the
matrices, a product added to the copy, and a copy back. For the factor matrices of a transformer
(block size 256) that is a tenth of a plain step on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("funshampoo", "FRAGMENT")
_LIBRARY.define("accumulate_gram_(Tensor(a!) old, Tensor x, float beta, float weight) -> ()")


def accumulate_gram_(old: Tensor, x: Tensor, beta: float, weight: float) -> Tensor:
    """old ← beta old + weight x xᵀ, (N, d, d) and (N, d, n), as one node of a graph."""
    torch.ops.funshampoo.accumulate_gram_(old, x, beta, weight)
    return old


def implement(function: Callable[[Tensor, Tensor, float, float], object]) -> None:
    """Implement `accumulate_gram_` by a function that writes into `old`; its result is ignored."""

    def run(old: Tensor, x: Tensor, beta: float, weight: float) -> None:
        function(old, x, beta, weight)

    def trace(old: Tensor, x: Tensor, beta: float, weight: float) -> None:
        """Only `old` changes."""

    _LIBRARY.impl("accumulate_gram_", run, "CompositeExplicitAutograd")  # on every device
    _LIBRARY.impl("accumulate_gram_", trace, "Meta")
