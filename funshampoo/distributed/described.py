"""A transformation in words: its stages, and the numbers that they were built with.

Stages are closures, so their numbers are what this package's functions have closed over. Foreign
functions are reported by name only: their contents may differ between ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.core.live import Live, is_ours

Line: TypeAlias = tuple[str, str]
"""(what it is, its value in words)"""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def described(transformation: GradientTransformation) -> list[Line]:
    """The parts of the transformation. Equal for two that were built in the same way.

    A live number is reported by its name, and a tensor by its shape and dtype, unless it is one
    number on the CPU.

    >>> from funshampoo import scale_by_learning_rate
    >>> described(scale_by_learning_rate(0.5))[-2:]
    [('scale_by_learning_rate: learning_rate', '0.5'), ('scale_by_learning_rate: sign', '-1')]
    """
    return list(_of_stage(transformation, {}))


def described_value(value: Any, label: str) -> list[Line]:
    """The same for a hyperparameter: a function or a number.

    >>> described_value((0.9, 0.99), "betas")[1:]
    [('betas: [0]', '0.9'), ('betas: [1]', '0.99')]
    """
    return list(_of(value, label, "", {}))


def _of_stage(stage: GradientTransformation, seen: dict[int, Any]) -> Iterator[Line]:
    if id(stage) in seen:
        return
    seen[id(stage)] = stage  # kept alive, so that nothing else gets its id
    if stage.parts:
        yield stage.name, f"made of {', '.join(stage.parts)}"
    for part in stage.parts.values():
        yield from _of_stage(part, seen)
    for function in ("init", "update", "apply"):
        if stage._given[function] is not None:
            yield from _of(stage._given[function], stage.name, "", seen)


def _of(value: Any, stage: str, name: str, seen: dict[int, Any]) -> Iterator[Line]:
    """The lines for any value; `name` is its name in the stage's functions."""
    label = f"{stage}: {name}" if name else stage
    if isinstance(value, GradientTransformation):
        yield from _of_stage(value, seen)
    elif isinstance(value, _PLAIN):
        yield label, repr(value)
    elif isinstance(value, Live):
        yield label, f"the live number '{value.name}'"
    elif isinstance(value, Tensor):
        one = value.device.type == "cpu" and value.numel() == 1
        yield label, f"{value.item()}" if one else f"{tuple(value.shape)}, {value.dtype}"
    elif isinstance(value, (Mapping, tuple, list)):
        named = isinstance(value, Mapping)
        yield label, f"{'dict' if named else 'sequence'} of {len(value)}"
        for key, x in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _of(x, stage, f"{name}[{key!r}]", seen)
    elif id(value) not in seen:
        seen[id(value)] = value
        yield label, getattr(value, "__qualname__", type(value).__qualname__)
        for inner, x in _inside(value):
            yield from _of(x, stage, inner or name, seen)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of its parts; "" for parts without a name."""
    if isinstance(value, functools.partial):
        yield "", value.func
        if is_ours(value.func):
            yield from (("", x) for x in (value.args, value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("", x) for x in (value.__self__, value.__func__))
    elif dataclasses.is_dataclass(value) and is_ours(type(value)) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr)
    elif isinstance(value, types.FunctionType) and is_ours(value):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                yield name, cell.cell_contents
            except ValueError:  # the cell is still empty
                continue
        yield from (("", x) for x in (value.__defaults__ or ()))
