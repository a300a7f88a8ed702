"""How a kept value is computed from a matrix: the rule that a stage passes to `Refreshing`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.linalg.solver import are_same


class Found(NamedTuple):
    """A rule's results, with the rows first.

    value:     a tuple of tensors, such as roots (..., d, d), shaped as `Rule.initial` shapes them.
    residual:  (...), error of each value by the rule's own estimate; -1 if it has none.
    condition: (...), condition number of the matrix; -1 if not computed.
    converged: (...), bool. Where False, the old value is kept and the failure is counted.
    """

    value: tuple[Tensor, ...]
    residual: Tensor
    condition: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """How a value is computed from a symmetric matrix of one side, and from the old value.

    Subclasses are frozen dataclasses of numbers, tensors and solvers. A rule is pure, treats each
    matrix of a stack independently, and may be called in another thread. Rules with equal settings
    share a batch; a tensor equals only itself.

    Attributes:
        side: d.
    """

    side: int

    @property
    def symmetric(self) -> Collection[int]:
        """Which tensors of the value are symmetric (..., d, d), and so can be packed."""
        return ()

    @property
    def threaded(self) -> bool:
        """Whether a CPU is faster with threads on different matrices than with one call for all.

        Each of these threads has one kernel thread.
        """
        return False

    @property
    def reads_old(self) -> bool:
        """Whether a call reads the old value; if not, it gets ()."""
        return True

    @property
    def relative_cost(self) -> float:
        """Time per matrix on one CPU thread, relative to an inverse root by `linalg.eigh`."""
        return 1.0

    @property
    def cost(self) -> float:
        """Modelled seconds per matrix."""
        return self.relative_cost * eigh_seconds(self.side)

    @abstractmethod
    def initial(self, like: Tensor) -> tuple[Tensor, ...]:
        """The value before the first refresh, for matrices of like's shape, dtype and device.

        Its entries may share memory (a broadcast identity): callers make copies.
        """

    @abstractmethod
    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        """The new value. If it raises LinAlgError, a matrix did not converge; see `Found`.

        Args:
            A: (..., d, d), never packed.
            old: the old value, never packed.
            rounds: (...) int64, how many values each row has accepted; 0: this is its first, and
                its `old` is the initial value.
        """


_CUBIC, _QUADRATIC, _CONSTANT = 9.5e-11, 4.2e-8, 1.2e-5


def eigh_seconds(d: int) -> float:
    """Approximate time of one CPU thread for an eigendecomposition and the products after it.

    In float32, as measured by benchmarks/cost_model.py; `distributed.cost` has the same weights.
    """
    return _CUBIC * d**3 + _QUADRATIC * d**2 + _CONSTANT


def is_same(rule: Rule, other: Rule) -> bool:
    """Whether two rules are equal; see `are_same`."""
    return type(rule) is type(other) and are_same(_numbers(rule), _numbers(other))


def tensors_of(rule: Rule) -> list[Tensor]:
    """The tensors among a rule's numbers, except those inside a solver."""
    return [x for x in _numbers(rule) if isinstance(x, torch.Tensor)]


def _numbers(rule: Rule) -> list[Any]:
    """Numbers in its fields; torch.compile before torch 2.13 can't trace `vars`."""
    return [getattr(rule, field.name) for field in dataclasses.fields(rule)]
