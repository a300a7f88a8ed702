"""A refresh of the roots: from factor matrices to the next `FactorRoot`s, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.tree import update_leaves
from funshampoo.linalg import Solver
from funshampoo.operators.exponents import Exponents, inverse_exponents
from funshampoo.operators.mode_products import bias_corrected
from funshampoo.refresh.ahead import compute_ahead, computed_ahead
from funshampoo.refresh.roots import (
    Found,
    RootRule,
    Rows,
    handed_over,
    overwrite,
    put,
    renewed_at_once,
    taken,
)
from funshampoo.refresh.solving import Solving, begin, result_of, solving
from funshampoo.refresh.turns import Refreshes, Turn
from funshampoo.state.stages import FactorRoot, KroneckerState


class _OnItsWay(NamedTuple):
    """A side whose roots are to be computed, and how they are taken over."""

    found: Solving | Found
    rows: Rows
    old: FactorRoot
    take_over: Callable[[Found, FactorRoot], FactorRoot]

    @property
    def parts(self) -> Sequence[Callable[[], Found]]:
        return self.found.parts if isinstance(self.found, Solving) else ()

    def ended(self, donate: bool) -> FactorRoot:
        """What the side remembers now; in the old one's memory, part by part, if it is donated."""
        old = self.old
        if donate and isinstance(self.found, Solving):
            for rows, found in self.found.results(self.rows):
                before = rows_of_side(old, rows)
                for x, was, y in zip(old, before, self.take_over(found, before)):
                    if y is not was:
                        overwrite(x, rows, y)
            return old
        new = self.take_over(result_of(self.found), rows_of_side(old, self.rows))
        return FactorRoot(*[put(x, self.rows, y) for x, y in zip(old, new)])


@dataclass(frozen=True)
class Refresh:
    """How the roots of all sides are computed: the arguments of `root_inverse` that say so."""

    solver: Solver
    epsilon: Hyper
    exponents: Exponents | None
    trace_scaling: Hyper | None
    basis_tolerance: Hyper | None

    def __call__(
        self,
        turns: Refreshes,
        updates: Tree,
        statistics: KroneckerState,
        roots: Tree,
        donate: bool,
    ) -> Tree:
        """The roots after a step on which it is these blocks' turn.

        The work of all leaves is known before any of it is begun, so that threads share it evenly.
        """
        factors, weight = statistics.factors, statistics.weight
        if turns.used is not None:
            _, roots = update_leaves(self._used, updates, (roots,), (turns.used, factors))
            roots = _all_ended(updates, roots, donate)
        if turns.now is not None:
            _, roots = update_leaves(self._now, updates, (roots,), (turns.now, factors, weight))
            roots = _all_ended(updates, roots, donate)
        if turns.asked is not None:
            _, roots = update_leaves(self._asked, updates, (roots,), (turns.asked, factors, weight))
        return roots

    def _rules(self, sides: int) -> list[RootRule | None]:
        return [
            RootRule(self.solver, 1 / e, self.epsilon, self.trace_scaling, self.basis_tolerance)
            if e
            else None
            for e in inverse_exponents(sides, self.exponents)
        ]

    def _now(self, u: Tensor, turn: Turn, factors: Any, weight: Tensor, sides: Any) -> Any:
        def on_its_way(rule: RootRule, factor: Any, old: FactorRoot) -> _OnItsWay:
            read = (old.root, factor, weight)
            found = solving(rule, _matrices(factor, weight), old.basis, turn.which, read)
            return _OnItsWay(found, turn.which, old, renewed_at_once)

        return u, self._each(on_its_way, turn, factors, sides)

    def _asked(self, u: Tensor, turn: Turn, factors: Any, weight: Tensor, sides: Any) -> Any:
        def asked(rule: RootRule, factor: Any, old: FactorRoot) -> FactorRoot:
            rows = turn.which
            pending = put(old.pending, rows, _matrices(factor, weight)(rows))
            compute_ahead(rule, pending, old.basis, rows, old.root)
            waiting = put(old.waiting, rows, torch.ones_like(taken(old.waiting, rows)))
            return old._replace(pending=pending, waiting=waiting)

        return u, self._each(asked, turn, factors, sides)

    def _used(self, u: Tensor, turn: Turn, factors: Any, sides: Any) -> Any:
        def on_its_way(rule: RootRule, factor: Any, old: FactorRoot) -> _OnItsWay:
            pending = old.pending
            assert isinstance(pending, Tensor)
            found = computed_ahead(rule, pending, old.basis, turn.which)
            return _OnItsWay(found, turn.which, old, handed_over)

        return u, self._each(on_its_way, turn, factors, sides)

    def _each(
        self, function: Callable[..., Any], turn: Turn, factors: Any, sides: Any
    ) -> tuple[Any, ...]:
        """`function(rule, factor, root)` for the sides that have a root, where it is their turn."""
        return tuple(
            function(rule, factor, old) if old and rule is not None and turn.any else old
            for rule, factor, old in zip(self._rules(len(factors)), factors, sides)
        )


def _all_ended(updates: Tree, roots: Tree, donate: bool) -> Tree:
    """Begin all, wait for all, and only then take them over.

    An operator here, between two that are waited for, would wake kernel threads of this thread,
    which then spin for milliseconds on the cores that the others need.
    """
    parts: list[Callable[[], Found]] = []

    def listed(u: Tensor, sides: Any) -> tuple[Any, ...]:
        for side in sides:
            if isinstance(side, _OnItsWay):
                parts.extend(side.parts)
        return u, sides

    def ended(u: Tensor, sides: Any) -> tuple[Any, ...]:
        return u, tuple(
            side.ended(donate) if isinstance(side, _OnItsWay) else side for side in sides
        )

    update_leaves(listed, updates, (roots,))
    begin(parts)
    for part in parts:
        part()
    return update_leaves(ended, updates, (roots,))[1]


def rows_of_side(side: FactorRoot, rows: Rows) -> FactorRoot:
    """Some rows of all that a side remembers."""
    return FactorRoot(*[taken(x, rows) for x in side])


def _matrices(factor: Any, weight: Tensor) -> Callable[[Rows], Tensor]:
    """rows -> their bias-corrected factors."""
    if not isinstance(factor, Tensor):
        raise ValueError(
            "root_inverse preconditions a side for which kronecker_statistics keeps no factor: "
            "give both stages the same exponents."
        )
    return lambda rows: bias_corrected(taken(factor, rows), taken(weight, rows))
