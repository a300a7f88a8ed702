"""Pytrees: the operations that stages need, and errors that name a leaf.

A gradient may be None ("this parameter had none"). None is therefore a leaf here, unlike in
optree's default, and stages leave the state and the update of such a leaf as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funshampoo.core.traced_tree import traced_flatten


class MaskedNode(NamedTuple):
    """Stands in for a leaf that `masked` hides: an empty node, so that no stage sees it."""


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure (an optree.PyTreeSpec, or its like in torch.compile); None is a leaf."""
    if torch.compiler.is_dynamo_compiling():
        return traced_flatten(tree)
    return optree.tree_flatten(tree, none_is_leaf=True)


def is_one(tree: Any, other: Any) -> bool:
    """Whether these are the same object; in a graph, whether they have the same leaves.

    torch 2.8 to 2.11 can't trace `is` for two dicts.
    """
    if not torch.compiler.is_dynamo_compiling():
        return tree is other
    ones, others = traced_flatten(tree)[0], traced_flatten(other)[0]
    return len(ones) == len(others) and all([x is y for x, y in zip(ones, others)])


_WHOLE = "(the tree itself)"
_NAMED = 4  # leaves in a message: enough to identify the tree


def leaf_names(tree: Any) -> list[str]:
    """One name per leaf, in the order of `flatten`: "conv1.weight", "layers.0.bias"."""
    named = names_in.__wrapped__ if torch.compiler.is_dynamo_compiling() else names_in
    return [*named(optree.tree_structure(tree, none_is_leaf=True))]  # Dynamo warns of caches


@functools.lru_cache(maxsize=64)
def names_in(spec: optree.PyTreeSpec) -> Sequence[str]:
    """`leaf_names` of a structure. Cached."""
    accessors = optree.treespec_accessors(spec)
    # for a named tuple the field, where `entry` is an index
    paths = [[getattr(step, "field", step.entry) for step in way] for way in accessors]
    names = [".".join(map(str, path)) or _WHOLE for path in paths]
    if len(set(names)) < len(names):  # {"a": {"b": ...}, "a.b": ...}
        names = [".".join(repr(key) if "." in str(key) else str(key) for key in p) for p in paths]
    return names


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `function(leaf, *parts)` to the leaves of `tree`; `rest` may go deeper than `tree`."""
    leaves, spec = flatten(tree)
    columns = [spec.flatten_up_to(other) for other in rest]
    return spec.unflatten([function(*row) for row in zip(leaves, *columns)])


def update_leaves(
    function: Callable[..., tuple[Any, ...]],
    updates: Any,
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
) -> tuple[Any, ...]:
    """Run `(u, *new_states) = function(u, *inputs, *states)` leaf by leaf.

    Args:
        function: called once for every leaf of `updates` that is not None.
        updates: the tree that sets the structure.
        states: trees with `updates` as their prefix: a leaf's state may be a tuple of tensors.
        inputs: further trees to read.

    Returns:
        The tree of new updates and one tree for each of `states`. Where the update is None, it
        and the states of that leaf come back as they are.

    Raises:
        ValueError: the trees do not fit together, before `function` is called.
        TypeError: it did not return a tuple of an update and the right number of states.
    """
    leaves, spec = flatten(updates)
    columns = columns_of((*inputs, *states), spec, updates, len(inputs))
    if not leaves:
        return (updates, *states)
    rows = []
    for u, *parts in zip(leaves, *columns):
        found = (None, *parts[len(inputs) :]) if u is None else function(u, *parts)
        if type(found) is not tuple or len(found) != 1 + len(states):
            raise TypeError(_no_row(found, len(states)))
        rows.append(found)
    return tuple(map(spec.unflatten, zip(*rows)))


def _no_row(found: Any, states: int) -> str:
    wanted = "(update,)" if not states else f"(update, {', '.join(['state'] * states)})"
    what = f"a tuple of {len(found)}" if type(found) is tuple else f"a {type(found).__name__}"
    return f"the function given to update_leaves returned {what}; it has to return {wanted}."


def update_columns(
    function: Callable[..., tuple[list[Any], ...]],
    updates: Any,
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
) -> tuple[Any, ...]:
    """`update_leaves` for elementwise stages: `function(us, *inputs, *states)` gets whole columns.

    A column is a list of a tree's leaves, or some of them, without those whose update is None.
    States and inputs have their update's shape, or that of its block axes.

    Raises:
        ValueError: one does not, so that it would be broadcast; before `function` is called. Names
            the leaf.
    """
    leaves, spec = flatten(updates)
    columns = columns_of((*inputs, *states), spec, updates, len(inputs))
    for column in columns:
        for u, part in zip(leaves, column):
            if u is not None and (own := part.shape) != u.shape and own != u.shape[: len(own)]:
                raise ValueError(_shapes_differ(updates, leaves, column))
    columns.insert(0, leaves)
    results = [leaves, *columns[1 + len(inputs) :]]
    portions = _portions(leaves)
    if len(portions) == 1 and len(portions[0]) == len(leaves):
        results = list(function(*columns))
    else:
        for part in portions:
            found = function(*[[column[i] for i in part] for column in columns])
            for column, new in zip(results, found):
                for i, x in zip(part, new):
                    column[i] = x
    return tuple(map(spec.unflatten, results))


_PORTION = 2**18
"""Numbers in a portion: on a CPU smaller temporaries stay in cache; larger leaves hide the loop."""


def _portions(leaves: list[Any]) -> list[list[int]]:
    """The leaves that are not None, by index, in runs that are processed together."""
    portions: list[list[int]] = []
    room = 0
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        size = leaf.numel() if leaf.is_cpu else 0
        room -= size
        if room < 0 or not portions:
            portions.append([])
            room = _PORTION - size
        portions[-1].append(i)
    return portions


def _shapes_differ(updates: Any, leaves: list[Any], parts: list[Any]) -> str:
    pairs = enumerate(zip(leaves, parts))
    i = next(i for i, (u, p) in pairs if u is not None and p.shape != u.shape[: p.ndim])
    return (
        f"the gradient of '{leaf_names(updates)[i]}' has shape {tuple(leaves[i].shape)}, its state "
        f"or parameter {tuple(parts[i].shape)}: init saw other parameters."
    )


def columns_of(trees: Sequence[Any], spec: Any, updates: Any, inputs: int = 0) -> list[list[Any]]:
    """The parts of each tree at the updates' leaves; the first `inputs` trees are not states."""
    columns: list[list[Any]] = []
    try:
        for tree in trees:
            columns.append(spec.flatten_up_to(tree))
    except ValueError as error:
        if len(columns) < inputs:
            raise ValueError(_input_differs(trees[len(columns)], updates)) from error
        raise ValueError(
            f"the gradients {leaf_names(updates)} do not fit the state: it was made by init for "
            "parameters in another tree."
        ) from error
    return columns


def _input_differs(tree: Any, updates: Any) -> str:
    if tree is None:  # `update` has checked, so a combinator failed to pass them on
        return (
            "a stage reads a tree beside its updates, as of parameters, and was given None: the "
            "combinator around it has to hand on what it got."
        )
    return (
        f"a stage reads {_described(tree)} beside its updates, which are {_described(updates)}. "
        "A tree that the caller passes under a name of its own is cut as the updates are, into "
        "stacks, parts or those of a rank, only if it has their structure and shapes, and these "
        "are not DTensors: give one tensor for each parameter, of its shape."
    )


def _described(tree: Any) -> str:
    names = leaf_names(tree)
    if names == [_WHOLE]:
        return "None" if tree is None else f"a {type(tree).__name__}"
    more = ", ..." if len(names) > _NAMED else ""
    return f"a {type(tree).__name__} of {', '.join(map(repr, names[:_NAMED]))}{more}"


def broadcast_prefix(prefix: Any, tree: Any, what: str) -> list[Any]:
    """One value of `prefix` for every leaf of `tree`: `prefix` may stop at any subtree.

    Raises:
        ValueError: `prefix` is not a prefix of `tree`; `what` names the argument.
    """
    values, spec = flatten(prefix)
    leaves, tree_spec = flatten(tree)
    places = tree_spec.unflatten(list(range(len(leaves))))
    try:
        subtrees = spec.flatten_up_to(places)
    except ValueError as error:
        raise ValueError(f"{what} is not a prefix of the tree it labels: {error}") from error
    # A dict is walked by sorted keys, an OrderedDict as is: the two pair by key, not by order.
    found = {i: v for v, part in zip(values, subtrees) for i in flatten(part)[0]}
    return [found[i] for i in range(len(leaves))]


def labels_of(given: Any, tree: Any, what: str) -> list[Any]:
    """One value for every leaf of `tree`, given as a prefix of it or as a function of the tree.

    Raises:
        ValueError: as `broadcast_prefix`.
        TypeError: the function treats a hidden leaf as a tensor.
    """
    if not callable(given):
        return broadcast_prefix(given, tree, what)
    try:
        found = given(tree)
    except AttributeError as error:
        if MaskedNode.__name__ not in str(error):
            raise
        raise TypeError(
            f"the function {what} met a leaf that a masked(...) or partition(...) around it hides, "
            "which stands there as MaskedNode(): give it a value too, as in "
            "isinstance(p, torch.Tensor) and p.ndim > 1, or give a tree in the function's place."
        ) from error
    return broadcast_prefix(found, tree, what)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype; if it already is, torch isn't called, which would take a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def wide(x: Tensor) -> Tensor:
    """x in its compute dtype."""
    return x.to(torch.float32) if x.dtype in HALF else x


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype for statistics and updates of `x`: float32 or wider."""
    return torch.float32 if x.dtype in HALF else x.dtype


HALF = (torch.bfloat16, torch.float16)


def check_same_structure(
    params: Any, other: Any, name: str
) -> tuple[tuple[list[Any], Any], tuple[list[Any], Any]]:
    """Check that the other tree has leaves where the parameters do, with the same shapes.

    Returns:
        The results of `flatten` for both.

    Raises:
        ValueError: names the first leaf that differs.
        TypeError: a leaf is complex in the other tree.
    """
    leaves, spec = flatten(params)
    others, other_spec = flatten(other)
    if spec != other_spec:
        raise ValueError(structures_differ(params, other, name))
    for i, (a, b) in enumerate(zip(leaves, others)):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            continue
        if a.dtype is not b.dtype and b.is_complex() and not a.is_complex():
            raise TypeError(f"leaf '{leaf_names(params)[i]}' is complex in {name}.")
        if a.shape != b.shape:
            raise ValueError(
                f"leaf '{leaf_names(params)[i]}' has shape {tuple(a.shape)} in params "
                f"and {tuple(b.shape)} in {name}."
            )
    return (leaves, spec), (others, other_spec)


def structures_differ(params: Any, other: Any, name: str) -> str:
    """How the other tree, with this name, differs from the parameters, as a sentence."""
    names, other_names = leaf_names(params), leaf_names(other)
    if names and other_names and set(names).isdisjoint(other_names):
        return (
            f"params and {name} have no leaf in common: params is {_described(params)}, "
            f"{name} is {_described(other)}. Give both as one kind of tree with the same "
            "keys, such as {name: tensor}, and the arguments in their order."
        )
    for leaf in names:
        if leaf not in other_names:
            return (
                f"params and {name} differ: leaf '{leaf}' is missing from {name}. "
                "A parameter without a gradient is written as None."
            )
    for leaf in other_names:
        if leaf not in names:
            return (
                f"params and {name} differ: leaf '{leaf}' is missing from params. Leave it "
                f"out of {name}, or call init for params that have it."
            )
    return (
        f"params and {name} have the same leaves in containers of different types: give both "
        "as one kind of tree."
    )
