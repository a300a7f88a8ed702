"""Whole tensors from the parts of a DTensor, and back, without communication: for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.boxes import Box, holding
from funshampoo.core.placed import is_in_parts, parts_like


def whole_of(parts: Sequence[Any], name: str) -> Tensor:
    """A DTensor as a plain tensor, from the parts that ranks have saved.

    Args:
        parts: DTensors of one shape and dtype, each as one rank had it; they may overlap.
        name: for errors.

    Raises:
        ValueError: they are from different tensors, have different values where they overlap, or do
            not cover the whole.
    """
    first = parts[0]
    if not all(is_in_parts(x) and _kind(x) == _kind(first) for x in parts):
        raise ValueError(f"'{name}' is of another shape, dtype or placement in some of the parts.")
    found = torch.empty(first.shape, dtype=first.dtype, device=first.to_local().device)
    there = torch.zeros(first.shape, dtype=torch.bool, device=found.device)
    for x in parts:
        for mine, box in _boxes(x):
            values, known = found[box], there[box]
            a, b = values[known], mine[known].to(values)
            if not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"'{name}' differs between the parts: they were not saved at the same step of "
                    "the same training."
                )
            values.copy_(mine)
            known.fill_(True)
    if not there.all():
        raise ValueError(
            f"of '{name}', {first.numel()} numbers, the parts have {int(there.sum())}: give what "
            "every rank saved."
        )
    return found


def placed_as(like: Any, x: Any) -> Tensor:
    """A copy of x placed like `like`: of a whole tensor, this rank's part.

    Args:
        x: a whole tensor; or a DTensor, if `lies_as` holds.
    """
    if not is_in_parts(like):
        plain: Tensor = x.detach().to(like, copy=True)
        return plain
    part = torch.empty_like(like.to_local())
    if is_in_parts(x):
        part.copy_(x.to_local())
    else:
        for mine, box in _boxes(like, part):
            mine.copy_(x[box])
    found: Tensor = parts_like([like], [part])[0]
    return found


def lies_as(like: Any, x: Any) -> bool:
    """Whether this rank's part of a saved DTensor is the part that `like` has here."""
    return (
        is_in_parts(like)
        and _kind(like) == _kind(x)
        and like.device_mesh.get_coordinate() == x.device_mesh.get_coordinate()
    )


def _kind(x: Any) -> Any:
    return tuple(x.shape), tuple(x.placements), tuple(x.device_mesh.shape)


def _boxes(x: Any, part: Tensor | None = None) -> Iterable[tuple[Tensor, tuple[slice, ...]]]:
    """(view of this rank's part, its place in the whole)."""
    local = x.to_local() if part is None else part
    for box in holding(x, tuple(x.shape)).boxes:
        yield local[_span(box.local, box)], _span(box.offset, box)


def _span(start: Sequence[int], box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, box.shape))
