"""The interface of a root solver: its signature, its result, and the checks that all share."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.checks import check_count, check_flag, check_range
from funshampoo.core.contract import Hyper
from funshampoo.core.modes import all_true, may_reuse


class InverseRoot(NamedTuple):
    """X = (A + damping·I)^(-1/p) for matrices A (..., d, d), and how far to trust each X.

    root:      (..., d, d), A's dtype, symmetric up to rounding. The identity where `converged` is
               False, so that `torch.where(converged[..., None, None], root, old)` is safe, under
               autograd too.
    residual:  (...), ‖X^(p/2) (A + damping·I) X^(p/2) - I‖₂, the largest relative error of an
               eigenvalue, estimated from below by power iterations. inf where there was nothing
               to solve. For `pseudo_inverse`, restricted to the eigenspace that is kept.
    condition: (...), λmax / λmin of A + damping·I (of the kept eigenvalues for `pseudo_inverse`).
    converged: (...), bool. False for a matrix that is not finite, that has no root, or whose root
               was not reached.

    Two choices in the residual. It is balanced: the entries of X^p (A + damping·I) - I, which has
    the same eigenvalues but is not symmetric, amplify rounding errors in X by up to √condition; in
    float32 at condition 1e6 they reach 0.3 to 7 for roots that are right to 1 %, the balanced
    residual 0.05 to 0.2. And it is a spectral norm: one unconverged eigenvalue leaves 1 in it, but
    only about 1/d in the largest entry. For odd p, iterative solvers split X^p into powers (p ±
    1)/2.

    Only `root` carries gradients.
    """

    root: Tensor
    residual: Tensor
    condition: Tensor
    converged: Tensor


Solver = Callable[[Tensor, float, Hyper], InverseRoot]
"""solver(A, p, epsilon) = (A + damping·I)^(-1/p), damping = epsilon + relative_epsilon·λmax(A).

A (..., d, d) is float32 or float64, symmetric and positive semidefinite up to rounding; epsilon is
a number or a tensor that broadcasts to A.shape[:-2]. A solver is pure, never raises because of a
matrix's values, and treats each matrix of the stack independently. Any function with this signature
will do; those of this package are `RootSolver`s.
"""


class RootSolver(ABC):
    """A `Solver` with visible settings: it can be pickled, compared, and used as a key.

    Subclasses are frozen dataclasses with eq=False. Two solvers are equal if their settings are; a
    tensor equals only itself.

    Attributes:
        least: {field: the smallest number that it may be}, checked at construction.
        threaded: whether on a CPU several Python threads with one kernel thread each finish a stack
            of matrices sooner than one with several. LAPACK gains little from a second kernel
            thread, products nearly the full factor.
        relative_cost: time per matrix on one CPU thread, relative to `linalg.eigh`; see
            `benchmarks.roots`. Ranks are balanced by it.
    """

    least: ClassVar[Mapping[str, float]] = {}
    threaded: ClassVar[bool] = False
    relative_cost: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        own: Any = self  # all that call this are dataclasses
        for field in dataclasses.fields(own):
            value, least = getattr(self, field.name), self.least.get(field.name)
            if field.type == "bool":
                check_flag(field.name, value)
            if least is None or (value is None and field.default is None):
                continue
            if field.type == "int":
                check_count(field.name, value, int(least))
            elif not isinstance(value, Tensor):  # it may have one number per matrix
                off = field.name == "max_residual"  # infinite: every root is accepted
                check_range(field.name, value, least, infinite=off)

    @abstractmethod
    def __call__(self, A: Tensor, p: float, epsilon: Hyper = 0.0) -> InverseRoot:
        """(A + damping·I)^(-1/p), as in `Solver`."""

    def __eq__(self, other: object) -> bool:
        alike = type(other) is type(self)
        return alike and are_same(vars(self).values(), vars(other).values())

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


def are_same(values: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether these are equal, one by one. A tensor equals only itself: no values are read."""
    pairs = zip(values, others)
    return all([a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs])


def relative_cost(solver: Any) -> float:
    """The relative cost of a solver or basis; 1 for a function that declares none."""
    return float(getattr(solver, "relative_cost", 1.0))


def check_matrix(A: Tensor) -> None:
    """Raise unless A is a stack of square float32 or float64 matrices."""
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be float32 or float64, got {A.dtype}: convert it with A.float()")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise ValueError(f"A must have shape (..., d, d) with d ≥ 1, got {tuple(A.shape)}")


def check_exponent(p: float) -> None:
    """Raise unless p is a positive Python number."""
    if isinstance(p, Tensor) or not 0 < p < math.inf:
        raise ValueError(f"p must be a positive Python number, got {p}: the root is A^(-1/p)")


def integer_exponent(p: float, solver: str, others: str = "others") -> int:
    """Return p as an int; raise unless it is a positive integer, which `solver` needs."""
    check_exponent(p)
    if p != int(p):
        raise ValueError(f"p must be an integer for {solver}, got {p}: use eigh() for {others}")
    return int(p)


def total_damping(
    A: Tensor, epsilon: Hyper, relative_epsilon: Hyper, largest: Callable[[], Tensor]
) -> Tensor:
    """Damping = epsilon + relative_epsilon·λmax(A), of shape A.shape[:-2] and A's dtype.

    `largest` returns λmax(A); it is not called when relative_epsilon is the number 0.
    """
    if not isinstance(epsilon, Tensor):
        check_range("epsilon", epsilon, 0)
    damping = A.new_zeros(A.shape[:-2]) + _like(epsilon, A, "epsilon")
    if isinstance(relative_epsilon, Tensor) or relative_epsilon != 0:
        # Rounding can make λmax of a vanishing matrix negative; damping must not be.
        damping = damping + _like(relative_epsilon, A, "relative_epsilon") * largest().clamp(min=0)
    return damping


def _like(value: Hyper, A: Tensor, name: str) -> Hyper:
    """`value` in A's dtype, so that a float32 hyperparameter does not lower float64 matrices."""
    if not isinstance(value, Tensor):
        return value
    shape, batch = value.shape, A.shape[:-2]
    last = batch[max(len(batch) - len(shape), 0) :]  # torch 2.8 graphs only zip equal lengths
    if len(shape) > len(batch) or any([n not in (1, count) for n, count in zip(shape, last)]):
        raise ValueError(f"{name} of shape {(*shape,)} must broadcast to the stack's {(*batch,)}")
    return value.to(dtype=A.dtype, device=A.device)


def identity_like(A: Tensor) -> Tensor:
    """The (d, d) identity of A's dtype and device."""
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def replace_nonfinite(A: Tensor) -> tuple[Tensor, Tensor]:
    """A with the identity in place of non-finite matrices, and which (...) are finite.

    The identity keeps such a matrix from reaching LAPACK, and makes its gradient exactly zero.
    """
    # If their sum is finite, all numbers are: usually one pass over a CPU's memory is enough.
    if A.is_cpu and all_true(A.detach().sum().abs() < torch.inf):
        return A, A.new_ones(A.shape[:-2], dtype=torch.bool)
    finite = A.detach().abs().amax((-2, -1)) < torch.inf  # one operator; isfinite() is four
    return or_identity(finite, A), finite


def or_identity(condition: Tensor, matrix: Tensor) -> Tensor:
    """The matrices (..., d, d) where the condition (...) holds, the identity elsewhere."""
    if condition.device.type == "cpu" and all_true(condition):
        return matrix
    return torch.where(condition[..., None, None], matrix, identity_like(matrix))


def where(condition: Tensor, matrix: Tensor, other: Tensor) -> Tensor:
    """torch.where matrix by matrix: condition (...), matrix and other (..., d, d).

    `matrix` itself if all conditions hold and that can be read without waiting.
    """
    return chooser(condition)(matrix, other)


def first(x: Tensor, other: Hyper) -> Tensor:
    """x: what `chooser` returns if it is known that all conditions hold."""
    return x


def chooser(condition: Tensor) -> Callable[[Tensor, Hyper], Tensor]:
    """`where` for several choices by one condition (...), for tensors that start with its axes."""
    if condition.device.type == "cpu" and all_true(condition):
        return first

    def choose(x: Tensor, other: Hyper) -> Tensor:
        return torch.where(
            condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, other
        )

    return choose


def add_to_diagonal(A: Tensor, damping: Tensor) -> Tensor:
    """A + damping·I."""
    if may_reuse(A, damping):  # the same numbers: one copy, and one pass over its diagonal
        B = A.clone(memory_format=torch.contiguous_format)
        B.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        return B
    return A + damping[..., None, None] * identity_like(A)


def symmetrize(A: Tensor) -> Tensor:
    """(A + Aᵀ)/2, bitwise equal to its transpose."""
    S = A + A.mT
    return S.div_(2) if may_reuse(S) else S / 2
