"""Values of hyperparameters: whether they are equal, change the state's structure, can be saved."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor

from funshampoo.core.tree import flatten, map_leaves


def same_value(x: Any, y: Any) -> bool:
    """Whether a recipe makes the same chain from these two values.

    A tensor never counts as the same: it may have been written to, after stages computed with it.
    """
    (xs, structure), (ys, other) = flatten(x), flatten(y)
    return structure == other and all(map(_same_leaf, xs, ys))


def _same_leaf(x: Any, y: Any) -> bool:
    return not isinstance(x, Tensor) and (x is y or (type(x) is type(y) and bool(x == y)))


def is_number(value: Any) -> bool:
    """Whether it can be a live number."""
    return isinstance(value, Tensor) or type(value) in (int, float)


def untouched(now: list[Any], before: list[Any]) -> bool:
    """Whether these are the same objects, none of which can have been written to."""
    return len(now) == len(before) and all([x is y and is_fixed(x) for x, y in zip(now, before)])


def is_fixed(value: Any) -> bool:
    """Whether it can't have been written to, unlike a tensor, a list or a dict."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return not isinstance(value, (Tensor, list, dict))


def structural(arguments: Any) -> Any:
    """The part of a recipe's arguments, or of one, that can change the structure of the state.

    The value of a float can't, except whether it is 0 or 1, which switch parts off.
    """

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "a tensor"
        return "a number" if isinstance(value, float) and value not in (0.0, 1.0) else value

    return map_leaves(kind, arguments)


def is_plain(value: Any) -> bool:
    """Whether torch.load(weights_only=True) can read it: numbers, strings, tensors, containers."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(v) for key, v in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    value = _number(value)
    return value is None or type(value) in (bool, int, float, str) or type(value) is Tensor


def copied(value: Any) -> Any:
    """A copy of containers, not of the tensors in them; NumPy's numbers become Python's."""
    whole = isinstance(value, (tuple, list, dict))
    return map_leaves(_number, value) if whole else _number(value)  # a number needs no flattening


def _number(value: Any) -> Any:
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Number):
        return value
    return value.item() if hasattr(value, "item") else value
