"""A transformation for some leaves only, or different ones for different leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from funshampoo.core.applying import add_in_place, applied, apply_of
from funshampoo.core.checks import check_flag
from funshampoo.core.clock import advanced, running, started
from funshampoo.core.context import Context, changed, with_cut
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.modes import is_traced, lie_apart
from funshampoo.core.parameters import check_tensors
from funshampoo.core.traced_tree import dict_like
from funshampoo.core.traits import for_some_leaves
from funshampoo.core.tree import MaskedNode, flatten, labels_of
from funshampoo.state.stages import MaskedState, PartitionState

Mask: TypeAlias = Any  # a tree of bools, a prefix of one, or a function of the parameters
Labels: TypeAlias = Any  # likewise with strings


def masked(inner: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Apply `inner` to the leaves where the mask is True; pass the others through unchanged.

    Args:
        inner: any transformation. It sees a tree in which the other leaves are `MaskedNode()`.
        mask: a tree of bools, a prefix of one, or a function of the parameters that returns one.

    State: `MaskedState`.

    Raises:
        ValueError: the mask is not a prefix of the tree.
        TypeError: from init, it holds something other than bools.

    >>> import torch
    >>> from funshampoo import scale
    >>> tx = masked(scale(0.0), mask={"w": True, "b": False})
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> tx.update(params, tx.init(params))[0]
    {'w': tensor([0.]), 'b': tensor([1.])}
    """
    inner = as_transformation(inner)

    def init(params: Tree, **context: Any) -> MaskedState:
        flags = _told(lambda p: bools_of(mask, p, "mask"), params, "masked")
        return MaskedState(_part_state(inner, params, flags, context))

    def update(
        updates: Tree, state: MaskedState, params: Tree, context: Context, *, in_place: bool = False
    ) -> tuple[Tree, MaskedState]:
        flags = labels_of(mask, updates if params is None else params, "mask")
        out, new = _step_part(inner, updates, state.inner, params, flags, context, in_place)
        if in_place:
            rest = [not flag for flag in flags]  # which pass through
            add_in_place(_hide(params, rest), _hide(updates, rest))
        return out, MaskedState(new)

    # A mask function may read shapes, and a rank's parts of DTensors have other ones.
    elementwise = inner.elementwise and not callable(mask)
    found = GradientTransformation(
        init,
        update,
        apply=apply_of(update),
        parts={"inner": inner},
        passes=inner.passes,
        elementwise=elementwise,
    )
    found.traits = for_some_leaves([inner], all_leaves=False)
    return found


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Labels
) -> GradientTransformation:
    """Different transformations for different leaves.

    Args:
        transformations: {label: transformation}.
        labels: a tree of labels, a prefix of one, or a function of the parameters that returns one.

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
    counts = any([part.counts for part in parts.values()])

    def flags_of(tree: Tree) -> dict[str, list[bool]]:
        given = labels_of(labels, tree, "labels")
        unknown = sorted({str(label) for label in given if label not in parts})
        if unknown:
            raise ValueError(
                f"labels contain '{unknown[0]}', for which there is no transformation; known: "
                f"{', '.join(map(str, parts))}."
            )
        return {label: [g == label for g in given] for label in parts}

    def init(params: Tree, *, clock: bool = False, **context: Any) -> PartitionState:
        context["clock"] = clock or counts
        states = {
            label: _part_state(parts[label], params, flags, context)
            for label, flags in _told(flags_of, params, "partition").items()
        }
        return PartitionState(states, started(counts, clock))

    def update(
        updates: Tree,
        state: PartitionState,
        params: Tree,
        context: Context,
        *,
        in_place: bool = False,
    ) -> tuple[Tree, PartitionState]:
        # If parameters are tied, one part would read what another has written.
        apart = in_place and not is_traced() and lie_apart(flatten(params)[0])
        inside = running(state.steps, context)
        states = {}
        for label, flags in flags_of(updates if params is None else params).items():
            updates, states[label] = _step_part(
                parts[label], updates, state.inner[label], params, flags, inside, apart
            )
        if in_place and not apart:
            add_in_place(params, updates)
        return updates, PartitionState(states, advanced(state.steps, context.donate))

    found = GradientTransformation(
        init,
        update,
        apply=apply_of(update),
        parts=parts,
        state_of=lambda state, label: state.inner[label],
        passes=all([part.passes for part in parts.values()]),
    )
    found.traits = for_some_leaves(parts.values(), all_leaves=True)
    return found


def bools_of(mask: bool | Mask, tree: Tree, what: str) -> list[bool]:
    """`labels_of`, where each label must be a bool: the string "no" would count as true.

    Raises:
        ValueError, TypeError: as `labels_of`; or a label is not a bool.
    """
    flags = labels_of(mask, tree, what)
    for flag in flags:
        if flag is not True and flag is not False:  # runs on every step: a call would be slow
            check_flag(what, flag)
    return flags


def _told(flags_of: Callable[[Tree], Any], params: Tree, stage: str) -> Any:
    """The flags; if the caller's function fails on what is not a tensor, the error says so."""
    try:
        return flags_of(params)
    except (AttributeError, TypeError, ValueError):
        check_tensors(params, stage)
        raise


def _part_state(
    tx: GradientTransformation, params: Tree, flags: list[bool], context: Mapping[str, Any]
) -> State:
    upstream = _hidden_states(context.get("upstream", ()), flatten(params)[1], flags)
    return tx.init(_hide(params, flags), **{**context, "upstream": upstream})


def _step_part(
    tx: GradientTransformation,
    updates: Tree,
    state: State,
    params: Tree,
    flags: list[bool],
    context: Context,
    in_place: bool,
) -> tuple[Tree, State]:
    """Step the flagged leaves; the other updates pass through. In place, all updates do."""
    seen = with_cut(context, updates, lambda tree: _hide(tree, flags))
    inside = _hidden_context(seen, flatten(updates)[1], flags)
    visible = None if params is None else _hide(params, flags)
    step = _hide(updates, flags), state, visible, inside
    if in_place:
        return updates, applied(tx, *step)
    out, new = tx.run(*step)
    return _fill(out, updates, flags), new


def _hide(tree: Tree, flags: list[bool]) -> Tree:
    leaves, spec = flatten(tree)
    return spec.unflatten([x if flag else MaskedNode() for x, flag in zip(leaves, flags)])


def _hidden_context(context: Context, spec: Any, flags: list[bool]) -> Context:
    """The context, with the same leaves hidden in its trees as in the updates."""

    def hidden(tree: Tree) -> Tree:
        return None if tree is None else _hide(tree, flags)

    return changed(
        context,
        gradient=hidden(context.gradient),
        alive=hidden(context.alive),
        upstream=_hidden_states(context.upstream, spec, flags),
        earlier=_hidden_states(context.earlier, spec, flags),
        later=_hidden_states(context.later, spec, flags),
    )


def _hidden_states(states: tuple[State, ...], spec: Any, flags: list[bool]) -> tuple[State, ...]:
    return tuple([_hide_below(state, spec, flags) for state in states])


def _hide_below(node: Any, spec: Any, flags: list[bool]) -> Any:
    """A state of another stage, with the same leaves hidden in every tree over the parameters."""
    try:
        # optree's error message prints all tensors, which takes forty times as long as a step
        parts = spec.flatten_up_to(node) if _begins_alike(spec, node) else None
    except ValueError:
        parts = None
    if parts is None:
        if isinstance(node, dict):
            below = {key: _hide_below(child, spec, flags) for key, child in node.items()}
            return dict_like(node, below)
        if isinstance(node, tuple):
            children = [_hide_below(child, spec, flags) for child in node]
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        return node
    return spec.unflatten([p if flag else MaskedNode() for p, flag in zip(parts, flags)])


def _begins_alike(spec: Any, node: Any) -> bool:
    """Whether the top node is of the spec's kind, as far as a cheap check can tell."""
    kind = getattr(spec, "type", None)
    if kind is None:  # a leaf, or a spec that does not tell its kind
        return True
    if issubclass(kind, dict):
        return isinstance(node, dict) and node.keys() == set(spec.entries())
    return type(node) is kind and len(node) == spec.num_children


def _fill(tree: Tree, original: Tree, flags: list[bool]) -> Tree:
    leaves, spec = flatten(original)
    visible = spec.flatten_up_to(tree)
    return spec.unflatten([v if flag else x for v, x, flag in zip(visible, leaves, flags)])
