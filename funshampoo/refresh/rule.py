"""How one kept thing is made from a matrix: what a stage gives to `Refreshing`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """What a rule made of matrices, rows first.

    value:     a tuple of tensors, such as roots (..., d, d), shaped as `Rule.initial` shapes them.
    residual:  (...), how far off each value is by the rule's own estimate; -1 where there is none.
    condition: (...), condition number of what it was made from; -1 where nobody asked.
    converged: (...), bool. Where it is False the old value is kept, and the failure is counted.
    """

    value: tuple[Tensor, ...]
    residual: Tensor
    condition: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """How a value is made from a symmetric matrix of one side, and from the old value.

    Subclasses are frozen dataclasses of numbers, tensors and solvers. A rule is pure, treats each
    matrix of a stack as if it were alone, and may be called in another thread. What differs in
    nothing but tensors that are not the same object is another rule; equal ones share a batch.

    Attributes:
        side: d.
    """

    side: int

    @property
    def symmetric(self) -> Collection[int]:
        """Which tensors of the value are symmetric (..., d, d), so that they can be packed."""
        return ()

    @property
    def threaded(self) -> bool:
        """Whether on a CPU threads on different matrices, each with one kernel thread, are faster.

        Than one call for all matrices, that is.
        """
        return False

    @property
    def reads_old(self) -> bool:
        """Whether a call looks at the old value; it gets () where it does not."""
        return True

    @property
    def relative_cost(self) -> float:
        """Time for one matrix on one CPU thread, in that of an inverse root by `linalg.eigh`."""
        return 1.0

    @property
    def cost(self) -> float:
        """Modelled seconds for one matrix."""
        return self.relative_cost * eigh_seconds(self.side)

    @abstractmethod
    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """The value before the first refresh, for matrices of the shape, dtype and device of this.

        It may share memory with itself (a broadcast identity): whoever asks makes copies.
        """

    @abstractmethod
    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The value now. Where it raises LinAlgError a matrix did not converge; see `Found`.

        Args:
            A: (..., d, d), never packed.
            old: the value before, never packed.
            rounds: (...) int64, how many values each row has had accepted; 0 says that it is the
                first, whose `old` is the initial one.
        """


_CUBIC, _QUADRATIC, _CONSTANT = 9.5e-11, 4.2e-8, 1.2e-5


def eigh_seconds(d: int) -> float:
    """About what one CPU thread needs for an eigendecomposition and what is made of it.

    In float32, as measured by benchmarks/cost_model.py; `distributed.cost` has the same weights.
    """
    return _CUBIC * d**3 + _QUADRATIC * d**2 + _CONSTANT


def is_same(rule: Rule, other: Rule) -> bool:
    """Whether two rules do the same. A tensor is the same as itself alone: nothing is read."""
    if type(rule) is not type(other):
        return False
    pairs = zip(_numbers(rule), _numbers(other))
    return all([a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs])


def tensors_of(rule: Rule) -> list[Tensor]:
    """The numbers of a rule that are tensors, but for those of a solver in it."""
    return [x for x in _numbers(rule) if isinstance(x, torch.Tensor)]


def _numbers(rule: Rule) -> list[Any]:
    """Of its fields; torch.compile before torch 2.13 can't trace `vars`."""
    return [getattr(rule, field.name) for field in dataclasses.fields(rule)]
