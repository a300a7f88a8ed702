"""What decides which state `init` makes of parameters: names, code, and the numbers in it.

A stage is made of closures, and a number that only its `update` reads, such as a learning rate, is
not among those of its `init`: two chains that differ in it are equal here.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CODE = types.CodeType, type


def built_with(x: Any, seen: dict[int, Any] | None = None) -> Any:
    """A value to compare, equal for transformations whose `init` does the same.

    Of objects of an unknown class it has the class alone, and of tensors the shape and dtype.

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
    return type(x), *[built_with(part, seen) for part in _inside(x)]


def _inside(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        yield from x
    elif isinstance(x, Mapping):
        yield from (*x, *x.values())
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, types.FunctionType):
        yield from (x.__code__, x.__defaults__, x.__kwdefaults__)
        yield from map(_content, x.__closure__ or ())
    elif isinstance(x, types.MethodType):
        of_fields = dataclasses.is_dataclass(x.__self__)
        yield from (x.__func__, x.__self__ if of_fields else getattr(x.__self__, "__dict__", None))
    elif dataclasses.is_dataclass(x):
        yield from (getattr(x, f.name) for f in dataclasses.fields(x) if f.repr)
    elif hasattr(x, "_given"):  # a transformation
        yield from (x.name, x._given["init"], x.parts)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
