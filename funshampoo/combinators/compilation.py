"""Plain steps as one graph of torch.compile, refreshes as they are."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from funshampoo.combinators.guard import surely_usable
from funshampoo.core.contract import (
    GradientTransformation,
    State,
    Tree,
    as_transformation,
    is_refresh,
    unasked_states,
    update_in_place,
)
from funshampoo.core.modes import is_traced
from funshampoo.core.tree import flatten
from funshampoo.state.stages import MultiStepsState, RefreshedState, ShardedState, find_state


def compiled(inner: GradientTransformation, **options: Any) -> GradientTransformation:
    """The same transformation, the steps that refresh no root compiled by torch.compile.

    A plain step becomes one graph, in which everything elementwise between two products is one pass
    over memory, without Python in between. Steps that refresh roots are left to the threads that
    `root_inverse` has for them. Numbers differ from those of `inner` by rounding. The graph is made
    on the first plain step, which takes from seconds to a minute, and again for other shapes.

    A step runs as it is, not compiled, too where a gradient is None or is not finite (as far as
    that can be read without waiting, on a CPU; elsewhere `guarded` decides in the graph), where the
    context holds numbers of the caller's (give tensors), and under torch.func and torch.compile.

    Args:
        inner: a whole chain. With `stagger`, every step refreshes, and none is compiled.
        options: of torch.compile, such as backend or mode; fullgraph is True and dynamic False
            where they are not given.

    Context: `step=` or `refresh=` say whether roots are recomputed, as in `root_inverse`. All else
    goes by the state's own counters in a graph.

    State: of `inner`.

    Raises:
        ValueError: from update, its blocks are `sharded`; there is a `multi_steps` inside (which
            goes around `compiled`); or it has roots, and a combinator around them has no
            `refreshes` to say when they are recomputed.

    >>> import torch
    >>> from funshampoo import sgd, update_in_place
    >>> tx = compiled(sgd(0.1), backend="eager")
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    inner = as_transformation(inner)

    def in_place(updates: Tree, state: State, params: Tree, **context: Any) -> State:
        return update_in_place(inner, updates, state, params, **context)

    def out_of_place(updates: Tree, state: State, params: Tree, **context: Any) -> Any:
        return inner.update(updates, state, params, **context)

    checked = False

    def by_graph(step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, as a graph wherever it can be one."""
        graph = _compiled(step, options)

        def run(updates: Tree, state: State, params: Tree = None, **context: Any) -> Any:
            nonlocal checked
            if is_traced():
                return step(updates, state, params, **context)
            if not checked:
                _check_compilable(inner, state)
                checked = True
            if is_refresh(inner, state, context) or _has_numbers(context):
                return step(updates, state, params, **context)
            gradients, _ = flatten(updates)
            usable = surely_usable(gradients)
            if usable is False or any([g is None for g in gradients]):
                return step(updates, state, params, **context)
            plain = {key: value for key, value in context.items() if key != "step"}
            plain |= {"refresh": False} | ({"finite": True} if usable else {})
            try:
                return graph(updates, state, params, **plain)
            except torch._dynamo.exc.TorchDynamoException:
                # Raises what the tracer has hidden, if the caller did something wrong.
                out_of_place(updates, state, params, **context | {"donate": False})
                raise

        return run

    update, apply = by_graph(out_of_place), by_graph(in_place)
    return GradientTransformation(inner.init, update, inner.name, apply, inner.refreshes)


def _has_numbers(context: Mapping[str, Any]) -> bool:
    """Of the caller's own: a graph would have them in its code, and be made anew for others."""
    return any(
        [
            isinstance(value, (int, float)) and not isinstance(value, bool)
            for name, value in context.items()
            if name not in ("step", "block_ndim")
        ]
    )


def _check_compilable(inner: GradientTransformation, state: State) -> None:
    if find_state(state, ShardedState) is not None:
        raise ValueError("compiled: a graph can't wait for other ranks; leave out sharded.")
    if find_state(state, MultiStepsState) is not None:
        raise ValueError(
            "compiled: a graph can't read the counter of multi_steps; compile what is inside, "
            "multi_steps(compiled(tx), every)."
        )
    unasked = unasked_states(inner.refreshes, state)
    if any(find_state(part, RefreshedState) is not None for part in unasked):
        raise ValueError(
            "compiled: there are roots, and nobody says when they are recomputed. Give the "
            "combinator around root_inverse refreshes=any_refreshes(...), see docs/stages.md."
        )


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """torch.compile of a function with a code object of its own.

    Dynamo counts graphs by code object: all chains of a process would share its limit of eight.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    compile_: Callable[..., Any] = torch.compile
    found: Callable[..., Any] = compile_(own, **{"fullgraph": True, "dynamic": False} | options)
    return found
