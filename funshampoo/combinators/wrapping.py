"""Write your own combinators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funshampoo.core.adapting import adapted_init, adapted_wrapping, name_of
from funshampoo.core.checks import check_flag
from funshampoo.core.clock import advanced, running, started
from funshampoo.core.context import PLACES, Context, changed
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.live import is_ours
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.traits import MAY_FLIP, refuse
from funshampoo.state.stages import OF_PARAMETERS, WrappedState


def wrapping(
    inner: GradientTransformation,
    update: Callable[..., tuple[Tree, Any]],
    init: Callable[..., Any] | None = None,
    name: str = "",
    flops: Callable[..., float] | None = None,
    elementwise: bool = False,
) -> GradientTransformation:
    """A combinator from a function that runs `inner` whenever it likes, on whatever it likes.

    Args:
        inner: any transformation.
        update: `update(run, updates, own, params=None, **context) -> (updates, own)`.
            `run(updates, **changes)` steps `inner` and returns its updates; `changes` are `params`
            and names of the context that `inner` is to see instead. It may be called once, more
            often or never; what runs on some steps only is written as `every_k` is, with a `phase`.
            With no default for `params`, a step without them is an error before it begins.
        init: `init(params, **context) -> own`; by default there is no state of its own.
        name: by default that of the function that `update` was defined in.
        flops: of its own products, see `GradientTransformation`.
        elementwise: whether `update` is; the whole is elementwise if `inner` is too.

    State: `WrappedState`.

    Raises:
        TypeError: from update, `run` was given an unknown name, or no pair was returned.
        ValueError: `inner` rounds stochastically; from update, `run` was given params=None, and
            `inner` needs them.

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
    check_flag("elementwise", elementwise)
    inner = as_transformation(inner)
    name = name or name_of(update)
    rounds = f"what changes updates has to come before it: put it behind {name}(...)."
    refuse(inner, name, rounds=rounds)
    first, step = adapted_init(init or (lambda params: ())), adapted_wrapping(update)
    counts = step.counts or inner.counts
    pace: dict[str, tuple[()]] = {"once": ()} if is_ours(update) else {}

    def init_both(params: Tree, *, clock: bool = False, **context: Any) -> WrappedState:
        context["clock"] = clock or counts
        own = first(params, context)
        a_tree = hasattr(own, "_fields") and type(own) is type(params)
        marks: dict[str, tuple[()]] = {**pace, OF_PARAMETERS: ()} if a_tree else pace
        return WrappedState(own, inner.init(params, **context), started(counts, clock), marks)

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
            if params is None and inner.needs:
                raise ValueError(
                    f"{name}: run was given params=None, and {inner.needs} needs the parameters: "
                    "leave params out, for those of the step, or give a tree of them."
                )
            found = inner.run(updates, stepped, params, changed(inside, **changes))
            out, stepped = checked_pair(found, inner.name)
            return out

        out, own = checked_pair(step.call(updates, state.own, params, inside, run), name)
        return out, WrappedState(own, stepped, advanced(state.steps, context.donate), state.pace)

    found = GradientTransformation(
        init_both,
        update_both,
        name,
        parts={"inner": inner},
        counts=counts,
        minds_alive=step.minds_alive or init is None,
        accepts=step.accepts,
        flops=flops,
        elementwise=elementwise and inner.elementwise,
        needs_params=step.needs_params or None,
    )
    found.wants |= step.wants
    if not is_ours(update):
        found.traits = {**found.traits, MAY_FLIP: name}
    if step.reads_hyper:
        found.live = None  # it is not known which
    return found
