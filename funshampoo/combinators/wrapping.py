"""Combinators of one's own, and one that runs now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funshampoo.core.adapting import adapted_init, adapted_wrapping, name_of
from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, running, slowed, started
from funshampoo.core.context import PLACES, Context, changed
from funshampoo.core.contract import (
    GradientTransformation,
    Phase,
    Tree,
    as_transformation,
)
from funshampoo.core.live import is_ours
from funshampoo.core.of_parts import checked_pair
from funshampoo.state.stages import EveryKState, WrappedState


def wrapping(
    inner: GradientTransformation,
    update: Callable[..., tuple[Tree, Any]],
    init: Callable[..., Any] | None = None,
    name: str = "",
    flops: Callable[..., float] | None = None,
) -> GradientTransformation:
    """A combinator from a function that runs `inner` when it likes, with what it likes.

    Args:
        inner: any transformation.
        update: `update(run, updates, own, params=None, **context) -> (updates, own)`. `run(updates,
            **changes)` steps `inner` and returns its updates; `changes` are `params` and names of
            the context that `inner` is to see instead. It may be called once, more often or never,
            if what decides that is a Python value, and then give a `phase` by hand.
        init: `init(params, **context) -> own`; by default there is no state of its own.
        name: by default that of the function that `update` was defined in.
        flops: of its own products, see `GradientTransformation`.

    State: `WrappedState`.

    Raises:
        TypeError: from update, `run` was given an unknown name, or no pair came back.

    >>> import torch
    >>> from funshampoo import scale_by_adam
    >>> from funshampoo.core.tree import update_leaves
    >>> def cautious(inner):
    ...     def update(run, updates, own):  # no step against the gradient's sign
    ...         agreeing = lambda u, g: (u * (u * g > 0),)
    ...         return update_leaves(agreeing, run(updates), (), (updates,))[0], own
    ...     return wrapping(inner, update)
    >>> tx = cautious(scale_by_adam())
    >>> tx.update({"w": torch.tensor([5.0, -1.0])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([ 1., -1.])}
    """
    inner = as_transformation(inner)
    name = name or name_of(update)
    first, step = adapted_init(init or (lambda params: ())), adapted_wrapping(update)
    counts = step.counts or inner.counts
    pace: dict[str, tuple[()]] = {"once": ()} if is_ours(update) else {}

    def init_both(params: Tree, *, clock: bool = False, **context: Any) -> WrappedState:
        context["clock"] = clock or counts
        own = first(params, context)
        return WrappedState(own, inner.init(params, **context), started(counts, clock), pace)

    def update_both(
        updates: Tree, state: WrappedState, params: Tree, context: Context
    ) -> tuple[Tree, WrappedState]:
        inside = changed(running(state.steps, context), usable=False)
        stepped = state.inner

        def run(updates: Tree, params: Tree = params, **changes: Any) -> Tree:
            nonlocal stepped
            unknown = sorted([key for key in changes if key not in PLACES])
            if unknown:
                raise TypeError(f"{name}: run knows no '{unknown[0]}'; known: {', '.join(PLACES)}.")
            found = inner.run(updates, stepped, params, changed(inside, **changes))
            out, stepped = checked_pair(found, inner.name)
            return out

        out, own = checked_pair(step.call(updates, state.own, params, inside, run), name)
        return out, WrappedState(own, stepped, advanced(state.steps, context.donate), pace)

    found = GradientTransformation(
        init_both,
        update_both,
        name,
        parts={"inner": inner},
        counts=counts,
        minds_alive=step.minds_alive or init is None,
        accepts=step.accepts,
        flops=flops,
    )
    if step.reads_hyper:
        found.live = None  # who knows which
    return found


def every_k(inner: GradientTransformation, k: int) -> GradientTransformation:
    """Run `inner` on the steps k, 2k, 3k, ...; on the others the updates pass through unchanged.

    `inner` counts its own steps: its first one is step k of this one. Its state stays as it is in
    between.

    Args:
        inner: any transformation.
        k: 1 or more.

    Context: `step=` decides in torch.compile, where the counter can't be read.

    State: `EveryKState`.

    Raises:
        ValueError, TypeError: k is no int of at least 1.
        RuntimeError: inside torch.compile without `step=`.

    >>> import torch
    >>> from funshampoo import scale
    >>> tx = every_k(scale(10.0), 2)
    >>> state = tx.init({"w": torch.zeros(1)})
    >>> for _ in range(3):
    ...     u, state = tx.update({"w": torch.ones(1)}, state)
    ...     print(u["w"])
    tensor([1.])
    tensor([10.])
    tensor([1.])
    """
    inner = as_transformation(inner)
    check_count("k", k)

    def init(params: Tree, *, clock: bool = False, **context: Any) -> EveryKState:
        return EveryKState(inner.init(params, clock=True, **context), started(True, clock))

    def update(
        updates: Tree, state: EveryKState, params: Tree, context: Context
    ) -> tuple[Tree, EveryKState]:
        here = running(state.steps, context)
        if here.step is None:
            raise RuntimeError(
                "every_k can't read the step counter inside torch.compile: pass step= (from 1)."
            )
        new = state.inner
        if here.step % k == 0:
            found = inner.run(updates, state.inner, params, slowed(here, k))
            updates, new = checked_pair(found, inner.name)
        return updates, EveryKState(new, advanced(state.steps, context.donate))

    def check(state: EveryKState, context: Context) -> None:
        here = running(state.steps, context)
        if inner.checks and here.step is not None and here.step % k == 0:
            inner.check(state.inner, slowed(here, k))

    def phase(step: int) -> Phase:
        return (f"every {k}", *inner.phase(step // k)) if step % k == 0 else ()

    def saved(block: tuple[int, ...], kept: tuple[int, ...], apart: bool) -> float:
        """What a step does not multiply, on average, of what `inner` states."""
        return (1 / k - 1) * inner.flops(block, kept, apart)

    return GradientTransformation(
        init, update, phase=phase, check=check, parts={"inner": inner}, counts=True, flops=saved
    )
