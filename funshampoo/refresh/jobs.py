"""The refresh of one unit: the matrices whose turn it is, and which results are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from funshampoo.core.context import changed
from funshampoo.core.modes import all_true, row_index
from funshampoo.core.tree import flatten, map_leaves
from funshampoo.linalg.solver import chooser, first
from funshampoo.operators.packed import pack, unpack
from funshampoo.refresh.rule import Found, Rule, tensors_of
from funshampoo.refresh.workers import can_run_in_a_thread
from funshampoo.state.stages import Kept

Reading = tuple[Any, ...]
"""(function, *tensors): a unit's matrices are function(*tensors), for some rows of all tensors."""


Rows = Sequence[int] | None
"""Rows of a stack; None: all, or the single matrix of a leaf."""


class Outcome(NamedTuple):
    """A `Found`, and `known` (...), bool: False where there is no result to use.

    That is so if the matrix is zero or denormal, or this step's gradient was not finite.
    """

    value: tuple[Tensor, ...]
    residual: Tensor
    condition: Tensor
    converged: Tensor
    known: Tensor


class Asked(NamedTuple):
    """The arguments of a rule."""

    A: Tensor
    old: tuple[Tensor, ...]
    rounds: Tensor


RowsT = TypeVar("RowsT", Asked, Found, Outcome)


class Job:
    """The refresh of some rows of one unit.

    Attributes:
        rule: computes the values.
        kept: the old values.
        rows: the rows whose turn it is.
        alive: for all rows, 0 where this step must change nothing; None: all are 1.
        parts: some of the rows each, in order, and a function that returns their results once the
            work has been done.
        shares: whether these results share memory with other jobs' results.
    """

    def __init__(
        self, rule: Rule, reading: Reading, kept: Kept, rows: Rows, alive: Tensor | None = None
    ) -> None:
        self.rule, self.kept, self.rows, self._alive = rule, kept, rows, alive
        self.parts: list[tuple[Rows, Callable[[], Outcome]]] = []
        self.shares = False
        self._matrices, *self._inputs = reading

    def in_threads(self) -> bool:
        """Whether the process has several kernel threads, and other threads may do this job."""
        if torch.compiler.is_dynamo_compiling() or not self.rule.threaded:
            return False
        read = (*tensors_of(self.rule), *self._inputs, *self.kept.value)
        return can_run_in_a_thread(*read) and torch.get_num_threads() > 1

    def every_row(self) -> Sequence[int]:
        """The rows of a stack whose turn it is."""
        return range(len(self.kept.rounds)) if self.rows is None else self.rows

    def asked(self, rows: Rows) -> Asked:
        """The rule's arguments for some of the rows."""
        old, rule = self.kept, self.rule
        values = [taken(x, rows) for x in (old.value if rule.reads_old else ())]
        inputs = [taken(x, rows) for x in self._inputs]
        A = self._matrices(*inputs)
        if any([A is x for x in inputs]):  # another stage's state, which a rule may return, or keep
            A = A.clone()
        return Asked(
            A,
            tuple([unpack(x) if i in rule.symmetric else x for i, x in enumerate(values)]),
            taken(old.rounds, rows),
        )

    def ended(self, donate: bool) -> Kept:
        """The values to keep now; written into the old memory, part by part, if it is donated."""
        kept = self.kept
        for rows, part in self.parts if donate else [(self.rows, self._joined)]:
            found = part()
            if self._alive is not None:
                alive = found.known & (taken(self._alive, rows) > 0)
                found = changed(found, known=alive)
            mine = map_leaves(functools.partial(taken, rows=rows), kept)
            kept = written(kept, mine, renewed(found, mine, self.rule), rows, donate)
        return kept

    def _joined(self) -> Outcome:
        """The results of all rows, in their own memory."""
        found = [part() for _, part in self.parts]
        return found[0] if len(found) == 1 and not self.shares else joined(found)


def outcome(rule: Rule, asked: Asked) -> Outcome:
    """The rule's result, and which matrices are usable: not zero, and not only denormal numbers.

    Once a block's gradients have become zeros, its average decays to a few denormal numbers and
    stays there: 0.99 times 50 of them rounds to 50 again. These are unusable.
    """
    known = _is_usable(asked.A.detach())
    found = _answer(rule, asked)
    if not isinstance(found, Found):
        raise TypeError(
            f"{type(rule).__name__} returned a {type(found).__name__}: a rule returns "
            "Found(value, residual, condition, converged), value a tuple of tensors."
        )
    for name in ("residual", "condition", "converged"):  # not by found[1:]: see `changed`
        x = getattr(found, name)
        if x.shape != known.shape:
            raise ValueError(
                f"{type(rule).__name__} returned {name} {tuple(x.shape)}, for matrices "
                f"{tuple(asked.A.shape)}: return one for each, {tuple(known.shape)}."
            )
    return Outcome(*found, known)


def _is_usable(A: Tensor) -> Tensor:
    """Whether (...) a matrix of A (..., d, d) has an entry that is neither zero nor denormal."""
    tiny = torch.finfo(A.dtype).tiny
    if A.is_cpu:  # of a positive semidefinite matrix, the largest lies on the diagonal
        found = A.diagonal(dim1=-2, dim2=-1).amax(-1) >= tiny
        if all_true(found):
            return found
    # Two operators: a CPU computes a norm of order 1 or infinity one number at a time.
    # Not >=: a NaN is not zero, but a failure to be counted.
    return ~(A.abs().amax((-2, -1)) < tiny)


def _answer(rule: Rule, asked: Asked) -> Found:
    """The rule's result; a matrix for which it raises LinAlgError did not converge.

    torch.linalg's functions raise it for a whole stack because of one matrix. The matrices are then
    passed one by one. Other errors are raised; so is this one inside torch.compile, whose graphs
    can't catch exceptions.
    """
    if torch.compiler.is_dynamo_compiling():
        return rule.__call__(*asked)  # torch 2.11 can't call a dataclass made in the graph
    try:
        return rule(*asked)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if asked.rounds.ndim and len(asked.rounds) > 1:
            rows = range(len(asked.rounds))
            return joined([_answer(rule, row_slice(asked, i, 1)) for i in rows])
    size = asked.A.detach().abs().sum((-2, -1))
    unknown = torch.full_like(size, torch.inf)
    return Found(rule.initial(asked.A), unknown, unknown, torch.zeros_like(size, dtype=torch.bool))


def row_slice(rows: RowsT, first: int, count: int) -> RowsT:
    """Some rows of a rule's arguments or results."""
    part: RowsT = map_leaves(lambda x: x.narrow(0, first, count), rows)
    return part


def joined(parts: Sequence[RowsT]) -> RowsT:
    """All rows of arguments or results given in parts, in new memory."""
    whole: RowsT = map_leaves(lambda *xs: torch.cat(xs), *parts)
    return whole


def renewed(found: Outcome, old: Kept, rule: Rule) -> Kept:
    """New values where the rule converged on nonzero matrices, else the old ones."""
    _check_values(found.value, old.value, rule)
    accepted = found.converged & found.known
    choose = chooser(accepted)

    def chosen(i: int, x: Tensor, before: Tensor) -> Tensor:
        was_packed = i in rule.symmetric and x.shape != before.shape
        # Always one memory layout, since the rounding of products depends on it.
        return choose(pack(x) if was_packed else x, before).contiguous()

    value = tuple([chosen(i, *pair) for i, pair in enumerate(zip(found.value, old.value))])
    numbers = found.residual.detach(), found.condition.detach()
    if choose is first:
        failures, streak = old.failures, torch.zeros_like(old.streak)
        return Kept(value, *numbers, failures, streak, old.rounds + 1)
    failed = found.known & ~found.converged
    return Kept(
        value=value,
        residual=choose(numbers[0], old.residual),
        condition=choose(numbers[1], old.condition),
        failures=old.failures + failed,
        streak=torch.where(failed, old.streak + 1, 0),
        rounds=old.rounds + accepted,
    )


def _check_values(found: Sequence[Tensor], old: Sequence[Tensor], rule: Rule) -> None:
    """Raise ValueError where one would be left out, or broadcast."""
    alike = [x.shape == y.shape for x, y in zip(found, old)]
    as_many = len(found) == len(old)
    for i in rule.symmetric if as_many and not all(alike) else ():  # the old ones may be packed
        alike[i] = found[i].shape == (*old[i].shape[:-2], rule.side, rule.side)
    if not as_many or not all(alike):
        mine, first = [[tuple(x.shape) for x in value] for value in (found, old)]
        raise ValueError(
            f"{type(rule).__name__} returned a value of tensors {mine}, where its `initial` makes "
            f"{first}: return as many, in the same order and shapes."
        )


def taken(x: Tensor, rows: Rows) -> Tensor:
    """Rows of a tensor: a view if they are contiguous. Without rows, the tensor as it is."""
    if rows is None or x.ndim == 0:
        return x
    if isinstance(rows, range):  # the usual case: a view of it would be made six times per unit
        return x if len(rows) == len(x) else x.narrow(0, rows.start, len(rows))
    return x.index_select(0, row_index(tuple(rows), x.device))


def written(kept: Kept, mine: Kept, new: Kept, rows: Rows, donate: bool) -> Kept:
    """The kept values with new ones in these rows; in their own memory if it is donated.

    Not if a derivative is needed, which may use the old values.

    Args:
        mine: what `taken` takes of them.
    """
    if rows is None and not donate:
        return new
    targets, sources = flatten(mine)[0], flatten(new)[0]
    if any([x.requires_grad for x in (*targets, *sources)]):
        donate = False
    if donate and (rows is None or isinstance(rows, range)):
        torch._foreach_copy_(targets, sources)  # `mine` are views
        return kept

    def put(x: Tensor, new: Tensor) -> Tensor:
        if rows is None:
            return new
        index = row_index(tuple(rows), x.device)
        return x.index_copy_(0, index, new) if donate else x.index_copy(0, index, new)

    found: Kept = map_leaves(put, kept, new)
    return found
