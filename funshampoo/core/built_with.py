"""What decides which state `init` makes of parameters: names, code, and the numbers in it.

A stage is made of closures, and a number that only its `update` reads, such as a learning rate, is
not among those of its `init`: two chains that differ in it are equal here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.live import Live

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CODE = types.CodeType, type


def built_with(x: Any, seen: dict[int, Any] | None = None) -> Any:
    """A value to compare, equal for transformations whose `init` does the same.

    Of tensors it has the shape and dtype. An object of a class that is not known here is equal to
    itself alone: what its `init` reads of it can't be seen.

    >>> from funshampoo import scale_by_adam
    >>> one, other, without = scale_by_adam(0.9), scale_by_adam(0.8), scale_by_adam(0.0)
    >>> built_with(one) == built_with(other), built_with(one) == built_with(without)
    (True, False)
    """
    if isinstance(x, _PLAIN):
        return type(x), x
    seen = {} if seen is None else seen
    if id(x) in seen:
        return seen[id(x)][0]
    seen[id(x)] = len(seen), x  # kept alive, so that nothing else gets its id
    if isinstance(x, Tensor):
        return Tensor, x.shape, x.dtype
    if isinstance(x, _CODE):
        return x
    if isinstance(x, (set, frozenset)) and all([isinstance(part, _PLAIN) for part in x]):
        return type(x), frozenset(x)
    parts = _inside(x)
    if parts is None:
        return _Itself(x)
    return type(x), *[built_with(part, seen) for part in parts]


class _Itself:
    """Equal for the same object alone. It may be a model, so it is kept alive only if it has to."""

    def __init__(self, x: Any) -> None:
        self._id = id(x)
        self._find: Callable[[], Any] = lambda: x
        with contextlib.suppress(TypeError):  # of a class without weak references
            self._find = weakref.ref(x)

    def __eq__(self, other: object) -> bool:
        x = self._find()
        return isinstance(other, _Itself) and x is not None and x is other._find()

    def __hash__(self) -> int:
        return self._id


def _inside(x: Any) -> Iterable[Any] | None:
    """What an object is made of; None if its class is not known."""
    if isinstance(x, (tuple, list)):
        return x
    if isinstance(x, Mapping):
        return *x, *x.values()
    if isinstance(x, Live):
        return x.name, x.initial, x.function
    if isinstance(x, functools.partial):
        return x.func, x.args, x.keywords
    if isinstance(x, types.FunctionType):
        return x.__code__, x.__defaults__, x.__kwdefaults__, *map(_content, x.__closure__ or ())
    if isinstance(x, functools._lru_cache_wrapper):
        return (x.__wrapped__,)
    if isinstance(x, types.MethodType):
        return x.__func__, x.__self__
    if dataclasses.is_dataclass(x):
        return [getattr(x, f.name) for f in dataclasses.fields(x) if f.repr]
    if isinstance(given := getattr(x, "_given", None), dict):  # a transformation
        return x.name, given["init"], x.parts
    return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
