"""Combinators: stages in a row, on some leaves only, or different ones on different leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from funshampoo.core.contract import (
    GradientTransformation,
    State,
    Tree,
    any_refreshes,
    as_transformation,
    update_in_place,
)
from funshampoo.core.tree import (
    MaskedNode,
    check_parameters,
    check_same_structure,
    flatten,
    labels_of,
)
from funshampoo.state.stages import MaskedState, PartitionState

Mask: TypeAlias = Any  # a tree of bools, a prefix of one, or a function of the parameters
Labels: TypeAlias = Any  # likewise with strings


def chain(
    *stages: GradientTransformation | tuple[str, GradientTransformation],
) -> GradientTransformation:
    """Apply stages one after the other: the updates of each are the next one's.

    Args:
        stages: transformations, or ("name", transformation) pairs. A stage's name is the key of its
            state; by default it is the function's (`trace`), and a second stage of the same name
            becomes `trace_2`. Name a stage yourself where another of its kind may be inserted
            before it later: states are found by name, not by place. The state of a chain that has
            grown is `tx.init(params) | old_state`.

    Context: every stage receives what the caller passed, and `upstream`: the new states of the
    stages before it, in this chain and in those around it. `gradient` is handed down as it came; it
    is absent outside a scope such as `blocked`, and then stages use their updates, so that clipping
    earlier in the chain reaches later moments, as in Optax. `finite` is handed to the first stage
    alone, since it speaks of what that one gets.

    State: a dict {name: state of the stage}.

    Raises:
        TypeError: a stage is not a transformation; from init, a parameter is not a dense real
            floating tensor (names the leaf).
        ValueError: two stages were given the same name; from update, gradients and parameters are
            different trees (names the leaf), or the state is another chain's (names the stage).

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

    def init(params: Tree, *, upstream: tuple[State, ...] = (), **context: Any) -> State:
        check_parameters(params, "chain")
        states: dict[str, State] = {}
        for name, stage in named.items():
            before = (*upstream, *states.values())
            states[name] = stage.init(params, upstream=before, **context)
        return states

    def update(
        updates: Tree,
        state: State,
        params: Tree = None,
        *,
        upstream: tuple[State, ...] = (),
        **context: Any,
    ) -> tuple[Tree, State]:
        check(updates, state, params)
        return _run(named, updates, state, params, upstream, context)

    def apply(
        updates: Tree,
        state: State,
        params: Tree,
        *,
        upstream: tuple[State, ...] = (),
        **context: Any,
    ) -> State:
        check(updates, state, params)
        last, stage = list(named.items())[-1]
        first = {name: tx for name, tx in named.items() if name != last}
        context["donate"] = True
        updates, states = _run(first, updates, state, params, upstream, context)
        if first:
            context.pop("finite", None)
        context["upstream"] = (*upstream, *states.values())
        states[last] = update_in_place(stage, updates, state[last], params, **context)
        return states

    def check(updates: Tree, state: State, params: Tree) -> None:
        if state.keys() != named.keys():
            raise ValueError(_other_chain(set(named), set(state)))
        if params is not None:
            check_same_structure(params, updates, "params", "gradients")

    ends_in_place = bool(named) and list(named.values())[-1].apply is not None
    return GradientTransformation(
        init,
        update,
        apply=apply if ends_in_place else None,
        refreshes=any_refreshes(named, lambda state, name: state[name]),
    )


def _run(
    stages: Mapping[str, GradientTransformation],
    updates: Tree,
    state: State,
    params: Tree,
    upstream: tuple[State, ...],
    context: Mapping[str, Any],
) -> tuple[Tree, dict[str, State]]:
    states: dict[str, State] = {}
    for name, stage in stages.items():
        before = (*upstream, *states.values())
        updates, states[name] = stage.update(
            updates, state[name], params, upstream=before, **context
        )
        if "finite" in context:
            context = {key: value for key, value in context.items() if key != "finite"}
    return updates, states


def masked(inner: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Apply `inner` to the leaves where the mask is True; pass the others through unchanged.

    Args:
        inner: any transformation. It sees a tree in which the other leaves are `MaskedNode()`.
        mask: a tree of bools, a prefix of one, or a function that makes one of the parameters.

    State: `MaskedState`.

    Raises:
        ValueError: the mask is not a prefix of the tree.

    >>> import torch
    >>> from funshampoo import scale
    >>> tx = masked(scale(0.0), mask={"w": True, "b": False})
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> tx.update(params, tx.init(params))[0]
    {'w': tensor([0.]), 'b': tensor([1.])}
    """
    inner = as_transformation(inner)

    def init(params: Tree, **context: Any) -> MaskedState:
        flags = labels_of(mask, params, "mask")
        context = _hidden_context(context, flatten(params)[1], flags)
        return MaskedState(inner.init(_hide(params, flags), **context))

    def update(
        updates: Tree, state: MaskedState, params: Tree = None, **context: Any
    ) -> tuple[Tree, MaskedState]:
        flags = labels_of(mask, updates if params is None else params, "mask")
        context = _hidden_context(context, flatten(updates)[1], flags)
        visible = None if params is None else _hide(params, flags)
        out, new = inner.update(_hide(updates, flags), state.inner, visible, **context)
        return _fill(out, updates, flags), MaskedState(new)

    return GradientTransformation(init, update, refreshes=any_refreshes({"inner": inner}))


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Labels
) -> GradientTransformation:
    """Different transformations for different leaves.

    Args:
        transformations: {label: transformation}.
        labels: a tree of labels, a prefix of one, or a function that makes one of the parameters.

    State: `PartitionState`, {label: state}.

    Raises:
        ValueError: a label without a transformation; labels that are not a prefix of the tree.

    >>> import torch
    >>> from funshampoo import scale
    >>> tx = partition({"on": scale(2.0), "off": scale(0.0)}, {"w": "on", "b": "off"})
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> tx.update(params, tx.init(params))[0]
    {'w': tensor([2.]), 'b': tensor([0.])}
    """
    parts = {label: as_transformation(part) for label, part in transformations.items()}

    def find_labels(tree: Tree) -> list[Any]:
        given = labels_of(labels, tree, "labels")
        unknown = sorted({str(label) for label in given if label not in parts})
        if unknown:
            raise ValueError(
                f"labels contain '{unknown[0]}', for which there is no transformation; known: "
                f"{', '.join(map(str, parts))}."
            )
        return given

    def member(label: str, given: list[Any]) -> GradientTransformation:
        return masked(
            parts[label], lambda tree: flatten(tree)[1].unflatten([g == label for g in given])
        )

    def init(params: Tree, **context: Any) -> PartitionState:
        given = find_labels(params)
        return PartitionState(
            {label: member(label, given).init(params, **context).inner for label in parts}
        )

    def update(
        updates: Tree, state: PartitionState, params: Tree = None, **context: Any
    ) -> tuple[Tree, PartitionState]:
        given = find_labels(updates if params is None else params)
        states = {}
        for label in parts:
            own = MaskedState(state.inner[label])
            updates, new = member(label, given).update(updates, own, params, **context)
            states[label] = new.inner
        return updates, PartitionState(states)

    refreshes = any_refreshes(parts, lambda state, label: state.inner[label])
    return GradientTransformation(init, update, refreshes=refreshes)


def _named(stages: tuple[Any, ...]) -> dict[str, GradientTransformation]:
    named: dict[str, GradientTransformation] = {}
    given = {s[0] for s in stages if isinstance(s, tuple) and s and isinstance(s[0], str)}
    for stage in stages:
        if isinstance(stage, tuple) and len(stage) == 2 and isinstance(stage[0], str):
            name, stage = stage[0], as_transformation(stage[1])
            if name in named:
                raise ValueError(f"two stages of the chain are named '{name}'.")
        else:
            stage = as_transformation(stage)
            name = _unused(stage.name, named.keys() | given)
        named[name] = stage
    return named


def _unused(name: str, taken: set[str]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def _other_chain(stages: set[str], found: set[str]) -> str:
    missing, unknown = sorted(stages - found), sorted(found - stages)
    return (
        f"the state is not this chain's: it lacks {missing or 'nothing'} and has "
        f"{unknown or 'nothing'} besides. Build the chain that made it, or call init; where stages "
        "were inserted, pass tx.init(params) | state."
    )


def _hide(tree: Tree, flags: list[bool]) -> Tree:
    leaves, spec = flatten(tree)
    return spec.unflatten([x if flag else MaskedNode() for x, flag in zip(leaves, flags)])


def _hidden_context(context: dict[str, Any], spec: Any, flags: list[bool]) -> dict[str, Any]:
    """`gradient` and `upstream` with the same holes as the updates."""
    hidden = dict(context)
    if context.get("gradient") is not None:
        hidden["gradient"] = _hide(context["gradient"], flags)
    if context.get("upstream"):
        states = [_hide_below(state, spec, flags) for state in context["upstream"]]
        hidden["upstream"] = tuple(states)
    return hidden


def _hide_below(node: Any, spec: Any, flags: list[bool]) -> Any:
    """A state of an earlier stage, with every tree over the parameters in it hidden likewise."""
    try:
        parts = spec.flatten_up_to(node)
    except ValueError:
        if isinstance(node, dict):
            return {key: _hide_below(child, spec, flags) for key, child in node.items()}
        if isinstance(node, tuple):
            children = [_hide_below(child, spec, flags) for child in node]
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        return node
    return spec.unflatten([p if flag else MaskedNode() for p, flag in zip(parts, flags)])


def _fill(tree: Tree, original: Tree, flags: list[bool]) -> Tree:
    leaves, spec = flatten(original)
    visible = spec.flatten_up_to(tree)
    return spec.unflatten([v if flag else x for v, x, flag in zip(visible, leaves, flags)])
