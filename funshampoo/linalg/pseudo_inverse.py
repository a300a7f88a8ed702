"""Inverse roots of rank-deficient matrices, on the eigenspace that carries information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.solver import InverseRoot, Solver, check_at_least
from funshampoo.linalg.spectral import Spectrum, inverse_root


def pseudo_inverse(*, rtol: float | Tensor | None = None, atol: float = 0.0) -> Solver:
    """Inverse root of the kind of Moore and Penrose (1955): zero along directions never seen.

        A = Q diag(λ) Qᵀ,   X = Q diag(f(λ)) Qᵀ
        f(λ) = λ^(-1/p) if λ > max(rtol·λmax, atol), else 0

    For any p > 0. Residual, condition and gradient are those of the kept eigenspace (the gradient
    at constant rank). A matrix with no eigenvalue to keep, such as zero, has the root zero.
    Failures of LAPACK, ties and second derivatives are as for `eigh`.

    rtol: None means d times the machine epsilon of A's dtype, the size of eigh's rounding errors.
    epsilon of the solver must be the number 0. Raises ValueError for another epsilon, a negative
    rtol or atol, or p ≤ 0; TypeError for a dtype other than float32 and float64.

    >>> A = torch.diag(torch.tensor([0.0, 16.0]))
    >>> pseudo_inverse()(A, 4, 0.0).root
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_at_least("rtol", 0.0 if rtol is None else rtol, 0)
    check_at_least("atol", atol, 0)

    return _PseudoInverse(rtol, atol)


@dataclass(frozen=True, eq=False)
class _PseudoInverse(EigenSolver):
    rtol: float | Tensor | None
    atol: float

    def check_epsilon(self, epsilon: float | Tensor) -> None:
        if isinstance(epsilon, Tensor) or epsilon != 0:
            raise ValueError(
                f"epsilon must be the number 0 for pseudo_inverse, got {epsilon}: damping would "
                "fill the null space that it leaves out; use eigh() for a damped root"
            )

    def from_spectrum(
        self, A: Tensor, spectrum: Spectrum, p: float, epsilon: float | Tensor
    ) -> InverseRoot:
        relative = A.shape[-1] * torch.finfo(A.dtype).eps if self.rtol is None else self.rtol
        if isinstance(relative, Tensor):
            relative = relative.to(A)
        values = spectrum.values
        # Zero is never kept, whatever the tolerances: it has no inverse.
        keep = values > (relative * values.amax(-1, keepdim=True)).clamp(min=self.atol)
        return inverse_root(A, spectrum, values, keep, p)
