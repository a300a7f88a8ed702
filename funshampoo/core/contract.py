"""The contract: a gradient transformation is a pair of pure functions over pytrees.

    init(params) -> state
    update(updates, state, params=None, **context) -> (updates, state)

It is Optax's contract (https://optax.readthedocs.io, `GradientTransformation`) with one addition:
`update` may take keyword arguments, the *context* (`core.context`). A function that does not
declare a name never sees it, so that a two- or three-argument `update` written for Optax works
unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from funshampoo.core.adapting import (
    adapted_flops,
    adapted_init,
    adapted_update,
    name_of,
    without_state,
)
from funshampoo.core.built_with import built_with
from funshampoo.core.checks import check_state
from funshampoo.core.context import Context, changed, context_of
from funshampoo.core.fit import Entered, Fits
from funshampoo.core.interrupted import Watched
from funshampoo.core.live import Live, check_placed, check_values, numbers_among
from funshampoo.core.modes import for_keeps
from funshampoo.core.needs import without_parameters
from funshampoo.core.of_parts import checks_of, united
from funshampoo.core.parameters import as_entering, check_parameters, is_recorded, unrecorded
from funshampoo.core.placed import SEEN, is_in_parts, placed_as
from funshampoo.core.traits import Traits, first_traits, wanted_by
from funshampoo.core.tree import flatten

Tree: TypeAlias = Any  # a pytree of tensors; optree and torch share no recursive type for mypy
TreeT = TypeVar("TreeT")  # to a type checker, a step preserves the type of the caller's tree
State: TypeAlias = Any
Hyper: TypeAlias = float | Tensor
Schedule: TypeAlias = Callable[[Tensor], Hyper]
Phase: TypeAlias = tuple[str, ...]
Block: TypeAlias = tuple[int, ...]  # a block's shape, or lengths of some of its sides

REFRESH = "refresh"
"""Prefix of a phase label whose steps have more work than a plain one."""

THREADS = "refresh in threads"
"""Label for work shared by CPU threads, each with one kernel thread."""


class EmptyState(NamedTuple):
    """The state of a transformation without memory."""


class GradientTransformation:
    """A pair of pure functions, `init` and `update`, and the name of the stage in a chain.

    Args:
        init: `init(params) -> state`; may also declare `upstream`, `block_ndim` and `clock` (True:
            an enclosing transformation counts steps, and `clock` and `step` are in the context).
        update: `update(updates, state, params=None, **context) -> (updates, state)`; it may omit
            `params` and any name of the context (see `Context`). If its fourth parameter is
            called `context`, it gets the `Context` itself, and steps others by `run`.
        name: the key of this stage's state in a chain. By default the name of the function that
            `update` was defined in: a stage written as `def sign(): ... def update(...)` is `sign`.
        apply: `apply(updates, state, params, context) -> state`, for callers who own both state
            and parameters: like `update` with donate=True, followed by W ← W + U in place in the
            parameters. None if that gains nothing; see `update_in_place`.
        phase: `phase(step) -> tuple of strings`: what happens on step number `step`, from 1, but
            not on every step; () on a plain one. "refresh" and labels that begin with it mark more
            work than a plain step has. By default, the phases of the parts.
        check: `check(state, context)`: raises whatever must be raised before a step changes
            anything. By default, the checks of the parts.
        parts: {name: transformation} for a combinator.
        state_of: (state, name) -> the part's state; by default its attribute of this name.
        counts: whether it needs the number of the step. By default, if it declares `step` or
            `clock`, or a part counts.
        minds_alive: whether it skips whatever is not `alive`. By default, if it declares that
            name, or takes the `Context`.
        accepts: the caller's names that `update` knows; None: any. By default its and its parts'.
        spread: how the blocks of its step are spread over ranks, for `blocked`.
        numbers: the hyperparameters that it looks up in `hyper`, some of which may be `Live`, so
            that a name that no stage reads is an error. By default none for a combinator itself;
            for a stage that declares `hyper`, or takes the `Context`, possibly any.
        flops: `flops(block, kept)`: floating-point operations per step in its own matrix products
            on a block of this shape, on average; `kept` are the lengths of the sides for which
            something is refreshed. It may declare `apart`, whether an earlier stage has changed the
            updates, so that they are not the `gradient`. Used to balance ranks and to make plans.
            None: none. The parts' are added; what a combinator saves of them is negative.
        passes: whether it never changes the updates.
        elementwise: whether each number of an update depends only on the same number of gradient,
            state and parameter; if so, it gets a rank's parts of DTensors, see `core.elementwise`.
        needs_params: whether a step without parameters is refused before anything is changed. By
            default, if a part needs them or, unless it takes any context, `params` has no default.
        casts: whether it takes gradients of any real floating dtype, and casts them as it steps
            them; otherwise all are cast to their parameters' compute dtype beforehand.
        refresh_cost: cost of the refresh of one matrix, relative to the default solver's time: a
            rule's `relative_cost`. By default the largest of the parts'; None: 1.

    Unpacks as Optax's does: `init, update = transformation`.

    >>> import torch
    >>> def sign():
    ...     def update(updates, state):
    ...         return {name: u.sign() for name, u in updates.items()}, state
    ...     return GradientTransformation(lambda params: EmptyState(), update)
    >>> stage = sign()
    >>> stage.name
    'sign'
    >>> state = stage.init({"w": torch.zeros(2)})
    >>> stage.update({"w": torch.tensor([3.0, -2.0])}, state)[0]
    {'w': tensor([ 1., -1.])}
    """

    def __init__(
        self,
        init: Callable[..., State],
        update: Callable[..., tuple[Tree, State]],
        name: str = "",
        *,
        apply: Callable[..., State] | None = None,
        phase: Callable[[int], Phase] | None = None,
        check: Callable[[State, Context], None] | None = None,
        parts: Mapping[str, GradientTransformation] | None = None,
        state_of: Callable[[State, str], State] = getattr,
        counts: bool | None = None,
        minds_alive: bool | None = None,
        accepts: Collection[str] | None = (),
        spread: Any = None,
        numbers: Iterable[Any] | None = None,
        flops: Callable[..., float] | None = None,
        passes: bool = False,
        elementwise: bool = False,
        refresh_cost: float | None = None,
        needs_params: bool | None = None,
        casts: bool = False,
    ) -> None:
        self.name = name or name_of(update)
        self.parts: Mapping[str, GradientTransformation] = parts or {}
        self.state_of, self.spread = state_of, spread
        self._given = {"init": init, "update": update, "apply": apply}
        self._init = adapted_init(init)
        adapted = adapted_update(update, accepts)
        self.run: Callable[[Tree, State, Tree, Context], tuple[Tree, State]] = adapted.call
        self.apply = apply
        self._phase, self._flops = phase, adapted_flops(flops)
        self.check: Callable[[State, Context], None] = check or checks_of(self.parts, state_of)
        self.passes, self.elementwise, self.casts = passes, elementwise, casts
        self._fits = Fits(self._made, lambda: built_with(self))
        children: list[Any] = list(self.parts.values())
        counting = adapted.counts or any([part.counts for part in children])
        self.counts: bool = counting if counts is None else counts
        costs = [part.refresh_cost for part in children if part.refresh_cost is not None]
        self.refresh_cost = max(costs, default=None) if refresh_cost is None else refresh_cost
        needing = [part.needs for part in children if part.needs]
        own_need = adapted.needs_params or bool(needing) if needs_params is None else needs_params
        self.needs: str = (needing or [self.name])[0] if own_need else ""
        self._knows_when = phase is not None or not adapted.branches
        minds = adapted.minds_alive if minds_alive is None else minds_alive
        self.minds_alive: bool = minds and all([part.minds_alive for part in children])
        self.checks: bool = check is not None or any([part.checks for part in children])
        self.accepts = united(adapted.accepts, accepts, *[part.accepts for part in children])
        may_read_any = numbers is None and adapted.reads_hyper and not children
        self.wants: frozenset[str] = adapted.wants.union(*wanted_by(children, update))
        self.reads_gradient: bool = any([p.reads_gradient for p in (adapted, *children)])
        self.traits: Traits = first_traits(children, update, passes, self.name)
        self.numbers = tuple(numbers or ())  # its own, without its parts'
        own = [x for x in numbers_among(self.numbers) if isinstance(x, Live)]
        self.lives: list[Live] = own + [x for part in children for x in part.lives]
        names = None if may_read_any else [x.name for x in own]
        self.live: frozenset[str] | None = united(names, *[part.live for part in children])

    def init(self, params: Tree, **context: Any) -> State:
        """The state for these parameters. Autograd records it for those that require gradients.

        Raises:
            TypeError: something in it is not a tensor (names the stage).
        """
        any(map(is_in_parts, flatten(params)[0]))  # remembered for the steps
        if torch.compiler.is_dynamo_compiling() or not torch.is_inference_mode_enabled():
            state = self._made(params, context)
        else:  # a later step may come outside inference mode, and write to the state
            with for_keeps():
                state = self._made(params, context)
        check_state(state, self.name)
        if not context and not torch.compiler.is_dynamo_compiling():
            self._fits.remember(params, state)
        return state

    def _made(self, params: Tree, context: Mapping[str, Any]) -> State:
        """What `init` makes of the parameters, once checked, which combinators leave to parts."""
        if not self.parts:
            check_parameters(params, self.name)
        return self._init(params, context)

    def update(
        self, updates: TreeT, state: State, params: Tree = None, **context: Any
    ) -> tuple[TreeT, State]:
        """(updates, state) after a step. Pure, unless donate=True.

        Args:
            updates: gradients; a leaf may be None. DTensors first get the placements of `params`.
            state: from `init`, or from the step before.
            params: a tree like the updates, if a stage needs them.
            context: names of `Context`, and those that a stage of yours declares.

        Raises:
            TypeError: no stage knows a name, or one lacks its; a gradient is not dense and real.
            ValueError: no stage reads the live numbers that `hyper` names. Gradients, state and
                parameters do not fit together, or a stage needs parameters and there are none.
        """
        given = context_of(context, self.accepts, self.live, self.wants)
        if given.hyper:
            check_values(given.hyper, self.lives)
        if self.needs and params is None:
            raise without_parameters(self.needs, given.block_ndim)
        if torch.compiler.is_dynamo_compiling():
            return self.run(placed_as(updates, params), state, params, given)
        updates, entered = self.checked(updates, state, params, given)
        donate = given.donate and not is_recorded(entered.gradients, state)
        given, looks = changed(given, entered=entered, donate=donate), entered.looks
        if looks.unlike and not self.casts:
            updates = as_entering(updates, params, casts=True)
        params = unrecorded(params, updates) if looks.of_module else params
        if donate:
            with Watched(state):
                found = self.run(updates, state, params, given)
        else:
            found = self.run(updates, state, params, given)
        self._fits.made(found, looks)
        return found

    def checked(
        self, updates: TreeT, state: State, params: Tree, context: Context
    ) -> tuple[TreeT, Entered]:
        """The gradients, placed as `run` takes them, and what enters. Not for use in torch.compile.

        Raises:
            ValueError: gradients, state and parameters do not fit together.
            TypeError: a gradient is not a dense tensor of a real floating dtype.
        """
        if context.hyper:
            check_placed(context.hyper, params)
        updates = placed_as(updates, params) if SEEN["any"] else updates
        entered = self._fits.checked(updates, state, params, context)
        if self.checks:
            self.check(state, context)
        return updates, entered

    def phase(self, step: int) -> Phase:
        """What happens on this step, from 1, but not on every step; () on a plain one."""
        if self._phase is not None:
            return self._phase(step)
        return tuple([label for part in self.parts.values() for label in part.phase(step)])

    def flops(self, block: Block, kept: Block = (), apart: bool = False) -> float:
        """Operations per step in the matrix products of all its stages, on a block of this shape.

        Args:
            kept: lengths of the sides for which something is refreshed, as in the state.
            apart: whether an earlier stage in the same scope changes the updates.

        >>> from funshampoo import kronecker_statistics, orthogonalize
        >>> kronecker_statistics().flops((2, 3)), orthogonalize(steps=5).flops((2, 3))
        (60.0, 320.0)
        """
        parts = [part.flops(block, kept, apart) for part in self.parts.values()]
        return self._flops(block, kept, apart) + sum(parts)

    def without_phase(self) -> list[str]:
        """The names of the stages, at any depth, whose schedule can't be known."""
        found = [name for part in self.parts.values() for name in part.without_phase()]
        return found if self._knows_when else [self.name, *found]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        yield self.init
        yield self.update

    def __repr__(self) -> str:
        inside = ", ".join(self.parts)
        return f"<{self.name}({inside})>"


def stateless(
    function: Callable[..., Tree], name: str = "", **options: Any
) -> GradientTransformation:
    """A stage without state from `function(updates, params=None, **context) -> updates`.

    Args:
        options: `numbers`, `passes`, `elementwise`, `needs_params`: see `GradientTransformation`.

    >>> import torch
    >>> sign = stateless(lambda updates: {name: u.sign() for name, u in updates.items()}, "sign")
    >>> sign.update({"w": torch.tensor([3.0, -2.0])}, EmptyState())[0]
    {'w': tensor([ 1., -1.])}
    """
    return GradientTransformation(
        lambda params: EmptyState(), without_state(function), name or name_of(function), **options
    )


def renamed(stage: GradientTransformation, name: str) -> GradientTransformation:
    """The same transformation under another name."""
    found = copy.copy(stage)
    found.name = name
    found._fits = Fits(found._made, lambda: built_with(found))
    return found


def refreshes(transformation: GradientTransformation, context: Context) -> bool:
    """Whether a step in this context recomputes cached values, as far as the host knows."""
    if context.refresh is not None:
        return context.refresh
    t = context.step
    return t is not None and any([p.startswith(REFRESH) for p in transformation.phase(t)])


def as_transformation(stage: Any) -> GradientTransformation:
    """Accept anything with `init` and `update` (an Optax-style named tuple, a plain pair).

    Raises:
        TypeError: `stage` has neither the two attributes nor the two items.
    """
    if isinstance(stage, GradientTransformation):
        return stage
    if hasattr(stage, "init") and hasattr(stage, "update"):
        return GradientTransformation(stage.init, stage.update)
    if isinstance(stage, tuple) and len(stage) == 2 and all(map(callable, stage)):
        return GradientTransformation(*stage)
    made = "Did you pass the function that makes it, without calling it?"
    hint = made if callable(stage) else "Of a list of stages, make chain(*stages)."
    if isinstance(stage, str):
        hint = f"Give funshampoo.{stage} or another recipe; names are for `for_model`."
    raise TypeError(f"{stage!r} is not a gradient transformation: needs init and update. {hint}")


def identity() -> GradientTransformation:
    """The transformation that changes nothing.

    >>> import torch
    >>> identity().update({"w": torch.ones(1)}, EmptyState())
    ({'w': tensor([1.])}, EmptyState())
    """
    return stateless(lambda updates: updates, "identity", passes=True, elementwise=True)
