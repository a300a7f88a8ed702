"""Stages in sequence."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funshampoo.core.applying import applied, apply_of
from funshampoo.core.clock import CLOCK, advanced, running, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.elementwise import LocalStep, local_step
from funshampoo.core.misfit import other_stages
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.parameters import check_parameters
from funshampoo.core.placed import SEEN, any_in_parts
from funshampoo.core.traits import check_behind_means, in_sequence
from funshampoo.core.tree import check_same_structure, flatten
from funshampoo.state.stages import ClockState


def chain(
    *stages: GradientTransformation | tuple[str, GradientTransformation],
) -> GradientTransformation:
    """Apply stages one after the other: the updates of each are the next one's input.

    Args:
        stages: transformations, or ("name", transformation) pairs. A stage's name is the key of its
            state; by default it is the function's (`trace`), and a second stage of the same name
            becomes `trace_2`. Name a stage yourself if you may later insert another of its kind
            before it: states are found by name, not by position. The state of a chain that has
            grown is `tx.init(params) | old_state`.

    Context: every stage receives what the caller passed, plus `upstream`, the new states of the
    stages before it, in this chain and in those around it; `earlier`, the old states of the same
    stages; and `later`, those of the stages after it. `gradient` is passed down unchanged. It is
    absent outside a scope such as `blocked`, where stages use their updates, so that clipping
    earlier in the chain affects later moments, as in Optax.

    State: a dict {name: state of the stage}. If a stage needs the number of the step, and no
    enclosing transformation counts, the chain does, in a `ClockState` under the name "clock".

    Raises:
        TypeError: a stage is not a transformation; from init, a parameter is not a dense real
            floating tensor (names the leaf); from update, a stage did not return a pair (names it).
        ValueError: two stages have the same name, or one is named "clock"; a stage stands behind
            one that has to come after it, such as a decay behind the learning rate; from update,
            gradients and parameters are different trees (names the leaf), or the state is another
            chain's (names the stage).

    >>> import torch
    >>> from funshampoo import scale, trace
    >>> tx = chain(trace(0.9), ("slow", scale(-0.5)))
    >>> params = {"w": torch.zeros(1)}
    >>> state = tx.init(params)
    >>> list(state)
    ['trace', 'slow']
    >>> tx.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([-0.5000])}
    """
    named = _named(stages)
    counts = any([stage.counts for stage in named.values()])
    in_order = ([*named], [CLOCK, *named])

    def init(
        params: Tree, *, upstream: tuple[State, ...] = (), clock: bool = False, **context: Any
    ) -> State:
        check_parameters(params, "chain")
        steps = started(counts, clock)
        states: dict[str, State] = {}
        for name, stage in named.items():
            before = (*upstream, *states.values())
            states[name] = stage.init(params, upstream=before, clock=clock or counts, **context)
        check_behind_means(named, states)
        return states if steps == () else {CLOCK: ClockState(steps), **states}

    def update(
        updates: Tree, state: State, params: Tree, context: Context, *, in_place: bool = False
    ) -> tuple[Tree, State]:
        check(updates, state, params)
        steps = state[CLOCK].steps if CLOCK in state else ()
        inside = running(steps, context)
        updates, states = _run(named, updates, state, params, inside, in_place)
        if CLOCK in state:
            states = {CLOCK: ClockState(advanced(steps, context.donate)), **states}
        return updates, states

    def check(updates: Tree, state: State, params: Tree) -> None:
        if not isinstance(state, dict):
            raise ValueError(
                f"the state is not this chain's, which is a dict of its stages', but a "
                f"{type(state).__name__}. Build the transformation that made it, or call init."
            )
        keys = [*state]  # usually in order; no dict views, because of torch 2.11
        if keys not in in_order and {key for key in keys if key != CLOCK} != set(named):
            raise ValueError(other_stages(set(named), set(state) - {CLOCK}))
        if torch.compiler.is_dynamo_compiling() and params is not None:
            check_same_structure(params, updates, "gradients")

    ends_in_place = bool(named) and list(named.values())[-1].apply is not None
    found = GradientTransformation(
        init,
        update,
        apply=apply_of(update) if ends_in_place else None,
        parts=named,
        state_of=operator.getitem,
        flops=functools.partial(_flops_on_top, list(named.values())),
        passes=all([stage.passes for stage in named.values()]),
        elementwise=all([stage.elementwise for stage in named.values()]),
        casts=any([stage.casts for stage in [*named.values()][:1]]),
    )
    found.traits = in_sequence(named.values())
    return found


def _flops_on_top(
    stages: Sequence[GradientTransformation],
    block: tuple[int, ...],
    kept: tuple[int, ...],
    apart: bool,
) -> float:
    """The extra products of stages, because one before them has changed the updates."""
    found, changed_by_now = 0.0, apart
    for stage in stages:
        if changed_by_now and not apart:
            found += stage.flops(block, kept, True) - stage.flops(block, kept, False)
        changed_by_now = changed_by_now or not stage.passes
    return found


def _run(
    stages: Mapping[str, GradientTransformation],
    updates: Tree,
    state: State,
    params: Tree,
    context: Context,
    in_place: bool,
) -> tuple[Tree, dict[str, State]]:
    """(updates, states) of the stages; `in_place` the last one adds to the parameters."""
    last = len(stages) - 1 if in_place else None
    states: dict[str, State] = {}
    old = [state[name] for name in stages]
    others: list[Any]
    upstream, earlier, later, *others = context
    local: LocalStep | None = None  # of elementwise stages in a row
    in_parts = SEEN["any"] and any_in_parts(flatten(updates)[0])
    for i, (name, stage) in enumerate(stages.items()):
        before, after = (*earlier, *old[:i]), (*old[i + 1 :], *later)
        # `usable`, the last field, is about the updates that the first stage gets.
        known = [(*upstream, *states.values()), before, after, *others[:-1], others[-1] and not i]
        inside = Context(*known)
        if in_parts:
            may = stage.elementwise and len(states) != last
            if may and local is None:
                local = local_step(updates, params, inside)
            if local is not None and may and local.fits(state[name]):
                local.stands(inside)
                local.updates, states[name] = local.run(stage, state[name])
                continue
            if local is not None:
                updates, local = local.placed(local.updates), None
        if len(states) == last:
            states[name] = applied(stage, updates, state[name], params, inside)
        else:
            found = stage.run(updates, state[name], params, inside)
            updates, states[name] = checked_pair(found, name)
    return updates if local is None else local.placed(local.updates), states


def _named(stages: tuple[Any, ...]) -> dict[str, GradientTransformation]:
    named: dict[str, GradientTransformation] = {}
    given = {s[0] for s in stages if isinstance(s, tuple) and s and isinstance(s[0], str)}
    for stage in stages:
        if isinstance(stage, tuple) and len(stage) == 2 and isinstance(stage[0], str):
            name, stage = stage[0], as_transformation(stage[1])
            if name in named:
                raise ValueError(f"two stages of the chain are named '{name}'.")
            if name == CLOCK:
                raise ValueError(f"'{CLOCK}' is the chain's own: give the stage another name.")
        else:
            stage = as_transformation(stage)
            name = _unused(stage.name, named.keys() | given | {CLOCK})
        named[name] = stage
    return named


def _unused(name: str, taken: set[str]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
