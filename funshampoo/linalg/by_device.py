"""Inverse roots by the method that suits the matrix's device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import may_wait
from funshampoo.linalg.eigensolver import eigh
from funshampoo.linalg.newton_schulz import newton_schulz, takes
from funshampoo.linalg.solver import InverseRoot, RootSolver, check_exponent, check_matrix

LARGEST_SIDE_OF_EIGH = 32
"""The largest side that is decomposed on a GPU.

Up to this side cuSOLVER decomposes a stack in one call. Above it torch before 2.12 decomposes the
matrices one by one: 64 of side 64 take an H100 57 ms, and 9 ms by products; 64 of side 512 take
1.1 s and 27 ms. A single matrix is faster by eigh up to side 256; see docs/gpu.md.
"""

LEAST_RELATIVE_EPSILON = 1e-6
"""With less, a matrix may have a larger condition than `newton_schulz` is prepared for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class by_device(RootSolver):
    """Inverse root by matrix products on a GPU, by eigendecomposition elsewhere, for any p > 0.

        newton_schulz(relative_epsilon=...):  A on CUDA, of a side above 32, a p that it takes
        eigh(relative_epsilon=...):           any other A

    In a CUDA graph (`cuda_graphed`), where nothing can wait, sides up to 32 use products too.

    A GPU multiplies faster than it finds eigenvalues, and the number of products is known in
    advance, so nothing has to wait. Errors, gradients and failures are those of the chosen solver.
    The choice never depends on values, so runs are reproducible.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2]. With a number below
    1e-6 it is eigh everywhere, since products need the damping to bound the condition number. The
    value of a tensor is not checked: that is up to the caller.
    Raises ValueError for a negative number as relative_epsilon or epsilon, or p ≤ 0; TypeError for
    a dtype other than float32 and float64.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> by_device(relative_epsilon=0.0)(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    least: ClassVar = {"relative_epsilon": 0}
    threaded: ClassVar[bool] = True  # on a CPU it is eigh

    relative_epsilon: Hyper = 1e-6

    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """See `RootSolver`."""
        check_matrix(A)
        check_exponent(p)
        relative = self.relative_epsilon
        is_conditioned = isinstance(relative, Tensor) or relative >= LEAST_RELATIVE_EPSILON
        by_products = takes(p) and is_conditioned and self._by_products(A)
        return (newton_schulz if by_products else eigh)(relative_epsilon=relative)(A, p, epsilon)

    def _by_products(self, A: Tensor) -> bool:
        return A.is_cuda and (A.shape[-1] > LARGEST_SIDE_OF_EIGH or not may_wait())
