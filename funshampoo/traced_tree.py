"""optree's traversal in plain Python, for torch.compile.

Dynamo follows optree through substitutes of its own, and loses its way where all leaves of a tree
are constants, such as a mask of bools (seen with torch 2.13 and optree 0.17 to 0.20). Here it meets
nothing but dicts, lists and tuples. The order is optree's: dict keys are sorted, None is a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TracedSpec:
    """A structure: the tree that it was taken from. The part of optree.PyTreeSpec that is used."""

    def __init__(self, template: Any) -> None:
        self.template = template

    def unflatten(self, leaves: Any) -> Any:
        """The tree of this structure with these leaves."""
        return _rebuild(self.template, iter(leaves))

    def flatten_up_to(self, tree: Any) -> list[Any]:
        """The subtrees of `tree` where this structure has leaves."""
        found: list[Any] = []
        _descend(self.template, tree, found)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedSpec) and _same(self.template, other.template)

    __hash__ = None  # type: ignore[assignment]


def traced_flatten(tree: Any) -> tuple[list[Any], TracedSpec]:
    """Leaves and structure of nested dicts, lists, tuples and named tuples."""
    leaves: list[Any] = []
    _collect(tree, leaves)
    return leaves, TracedSpec(tree)


def _keys(node: dict[Any, Any]) -> list[Any]:
    return sorted(node.keys())


def _collect(node: Any, leaves: list[Any]) -> None:
    if isinstance(node, dict):
        for key in _keys(node):
            _collect(node[key], leaves)
    elif isinstance(node, (tuple, list)):
        for child in node:
            _collect(child, leaves)
    else:
        leaves.append(node)


def _rebuild(node: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(node, dict):
        rebuilt = {key: _rebuild(node[key], leaves) for key in _keys(node)}
        return {key: rebuilt[key] for key in node}
    if isinstance(node, (tuple, list)):
        children = [_rebuild(child, leaves) for child in node]
        if isinstance(node, list):
            return children
        return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
    return next(leaves)


def _descend(template: Any, node: Any, found: list[Any]) -> None:
    if isinstance(template, dict):
        if not isinstance(node, dict) or _keys(node) != _keys(template):
            raise ValueError(f"expected a dict with the keys {_keys(template)}.")
        for key in _keys(template):
            _descend(template[key], node[key], found)
    elif isinstance(template, (tuple, list)):
        if not isinstance(node, (tuple, list)) or len(node) != len(template):
            raise ValueError(f"expected {len(template)} children.")
        for child, other in zip(template, node):
            _descend(child, other, found)
    else:
        found.append(node)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and _keys(a) == _keys(b)
            and all([_same(a[key], b[key]) for key in _keys(a)])
        )
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, (tuple, list))
            and len(a) == len(b)
            and all([_same(x, y) for x, y in zip(a, b)])
        )
    return not isinstance(b, (dict, tuple, list))
