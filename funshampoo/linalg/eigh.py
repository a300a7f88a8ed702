"""Inverse roots by eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.solver import (
    InverseRoot,
    Solver,
    add_to_diagonal,
    check_at_least,
    total_damping,
)
from funshampoo.linalg.spectral import Spectrum, inverse_root


def eigh(*, relative_epsilon: float | Tensor = 0.0, floor: bool = True) -> Solver:
    """Inverse root by eigendecomposition (Shampoo, arXiv 1802.09568), for any p > 0.

        A = Q diag(λ) Qᵀ,   X = Q diag(λ̃^(-1/p)) Qᵀ
        damping = epsilon + relative_epsilon·λmax
        floor=True:   λ̃ = max(λ, 0) + damping
        floor=False:  λ̃ = λ - min(λmin, 0) + damping

    Where A is positive semidefinite the two agree; they differ in how they repair eigenvalues that
    rounding has made negative. The floor moves those alone; floor=False moves the whole spectrum,
    as the reference implementation of Distributed Shampoo (arXiv 2309.06497) does. In float32,
    eigenvalues below about 1e-7·λmax are rounding errors: keep the damping above that, or use
    `pseudo_inverse`.

    A matrix that LAPACK fails on is decomposed again in float64, by itself (not inside
    torch.compile, where its error is raised). A root fails when λ̃ is not positive, or when what
    came back is no decomposition (`verification.is_decomposition`). Gradients flow to A, epsilon
    and relative_epsilon, are finite at tied eigenvalues, and treat the repair as a constant;
    second derivatives are a NotImplementedError.

    relative_epsilon: a number, or a tensor that broadcasts to A.shape[:-2].
    Raises ValueError for a negative number as relative_epsilon or epsilon, or p ≤ 0; TypeError for
    a dtype other than float32 and float64.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 16.0]))
    >>> eigh()(A, 4, 0.0).root
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_at_least("relative_epsilon", relative_epsilon, 0)

    return _Eigh(relative_epsilon, floor)


@dataclass(frozen=True, eq=False)
class _Eigh(EigenSolver):
    relative_epsilon: float | Tensor
    floor: bool

    def from_spectrum(
        self, A: Tensor, spectrum: Spectrum, p: float, epsilon: float | Tensor
    ) -> InverseRoot:
        values = spectrum.values
        damping = total_damping(A, epsilon, self.relative_epsilon, lambda: values.amax(-1))
        repair = (-values if self.floor else -values.amin(-1, keepdim=True)).clamp(min=0)
        repaired = values + repair + damping[..., None]
        return inverse_root(add_to_diagonal(A, damping), spectrum, repaired, None, p)
