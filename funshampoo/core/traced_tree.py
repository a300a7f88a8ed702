"""optree's traversal in plain Python, for torch.compile.

Dynamo follows optree through its own substitutes, and fails if all leaves of a tree are constants,
such as a mask of bools (seen with torch 2.13 and optree 0.17 to 0.20). Here it only meets dicts,
lists and tuples. The order is optree's: keys of a dict are sorted, those of an OrderedDict are not,
None is a leaf.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any


class TracedSpec:
    """A structure: the tree that it was taken from. The part of optree.PyTreeSpec that is used."""

    def __init__(self, template: Any) -> None:
        self.template = template

    def unflatten(self, leaves: Any) -> Any:
        """The tree with this structure and these leaves."""
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
    spec = TracedSpec(tree)
    return spec.flatten_up_to(tree), spec


def _keys(node: Any) -> Sequence[Any]:
    """The keys of a dict sorted, as in optree; those of an OrderedDict in their own order."""
    if not isinstance(node, dict):
        return range(len(node))
    if isinstance(node, OrderedDict):
        return list(node.keys())
    if all([isinstance(key, str) for key in node]):
        return sorted(node.keys())
    return sorted(node.keys(), key=_type_and_value)


def _type_and_value(key: Any) -> tuple[str, str, Any]:
    return type(key).__module__, type(key).__qualname__, key


def _rebuild(node: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(node, dict):
        rebuilt = {key: _rebuild(node[key], leaves) for key in _keys(node)}
        return dict_like(node, {key: rebuilt[key] for key in node})
    if isinstance(node, (tuple, list)):
        children = [_rebuild(child, leaves) for child in node]
        if isinstance(node, list):
            return children
        return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
    return next(leaves)


def dict_like(node: dict[Any, Any], children: dict[Any, Any]) -> dict[Any, Any]:
    """The children in a dict of the node's kind, since optree distinguishes kinds of dicts."""
    if isinstance(node, defaultdict):
        return defaultdict(node.default_factory, children)
    return OrderedDict(children) if isinstance(node, OrderedDict) else children


def _descend(template: Any, node: Any, found: list[Any]) -> None:
    if isinstance(template, (dict, tuple, list)):
        if not _alike(template, node):
            raise ValueError(f"expected a {type(template).__name__} with the same children.")
        for key in _keys(template):
            _descend(template[key], node[key], found)
    else:
        found.append(node)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (dict, tuple, list)):
        return _alike(a, b) and all([_same(a[key], b[key]) for key in _keys(a)])
    return not isinstance(b, (dict, tuple, list))


def _alike(a: Any, b: Any) -> bool:
    """Whether two containers have one kind and the same keys or length. All dicts are one kind."""
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a.keys()) == set(b.keys())
    return type(a) is type(b) and len(a) == len(b)
