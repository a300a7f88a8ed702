"""Values that no run can have produced: the detectable damage in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.core.placed import local_part
from funshampoo.operators.packed import unpack
from funshampoo.state.meaning import parts_of
from funshampoo.state.naming import Named

_AT_A_TIME = 2**24  # numbers that are checked together
_RANGE = re.compile(r"([\[(])([^\s,]+), ([^\s,\])]+)([\])])")  # as in "number [0.0, 1.0)"
_OFF_ORTHONORMAL = 0.1  # an entry of QQᵀ - I: rounding leaves a hundredth of it, in bfloat16 too
_ABOVE_ONE = 1.01  # limit of a weight: a long average's rounds to slightly above 1


def problems(entries: Sequence[Named], limit: int | None) -> list[str]:
    """The problems of these values: "'w/trace/buffer' is not finite", one line per entry.

    Entries with equal shape and meaning are checked together. Waits for the device.

    Args:
        limit: the upper limit of all counts; None if unknown.
    """
    found: dict[str, str] = {}
    for some in _alike(_pairs(entries)):
        first, other = some[0]
        x = _stacked([entry.x for entry, _ in some]).to(first.dtype)
        y = None if other is None else _stacked([o.x for _, o in some if o])
        for bad, reason in _faults(first.kind, x, y, limit):
            for i in torch.nonzero(bad).flatten().tolist():
                found.setdefault(some[i][0].name, reason)
    return [f"'{name}' {reason}" for name, reason in found.items()]


def _faults(
    declared: str, x: Tensor, y: Tensor | None, limit: int | None
) -> Iterator[tuple[Tensor, str]]:
    """((n,) bool, what is wrong there) for n entries of one kind, (n, ...).

    Args:
        y: the entries of the field that the kind names, if it names one.
    """
    kind, relation, field = parts_of(declared)
    if y is not None and relation == " <= ":
        yield _rows(x > y.to(x.device)), f"is above its '{field}'"
    elif y is not None:
        yield _rows(x == 0) & _rows(y != 0).to(x.device), f"is 0, while its '{field}' is not"
    if kind.startswith("number"):
        yield _rows(x.isnan()), "is NaN"
        for left, low, high, right in _RANGE.findall(kind):
            above = x > float(low) if left == "(" else x >= float(low)
            below = x < float(high) if right == ")" else x <= float(high)
            yield _rows(~(above & below)), f"is not in {left}{low}, {high}{right}, as it has to be"
        return
    if x.is_floating_point() or x.is_complex():
        yield _rows(~torch.isfinite(x)), "is not finite"
    if kind in ("steps", "count", "weight", "nonnegative"):
        yield _rows(x < 0), "is negative"
    if kind == "weight":
        yield _rows(x > _ABOVE_ONE), "is above 1, as no weight of an average is"
    if kind == "count" and limit is not None:
        yield _rows(x > limit), f"is above the clock, which is at {limit}"
    if kind == "orthonormal":
        Q = x if x.dtype == torch.float64 else x.float()
        with full_precision():
            gram = Q @ Q.mT
        there = (Q != 0).any(-1)  # a coordinate without any gradient so far has a zero row
        off = (gram - there.to(Q.dtype).diag_embed()).abs() > _OFF_ORTHONORMAL
        yield _rows(off) | _rows(~there.any(-1)), "has rows that are not orthonormal"
    if kind == "factor":
        L = unpack(x)
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        yield _rows(diagonal < 0), "is negative on the diagonal, as no sum of squares is"
        root = (diagonal.clamp(min=0) + torch.finfo(L.dtype).tiny).sqrt()
        # Twice the bound, since the average is rounded on every step.
        beyond = L.abs() > 2 * root.unsqueeze(-1) * root.unsqueeze(-2)
        yield _rows(beyond), "has an entry above √(L_ii L_jj), as no sum of A Aᵀ has"


_Pair: TypeAlias = tuple[Named, Named | None]
"""An entry, and an entry of the field that its kind names; see `meaning`."""


def _pairs(entries: Sequence[Named]) -> Iterator[_Pair]:
    """Every entry that has to be checked, with each entry of the other field, or with None.

    A bound with another shape belongs to other blocks, and says nothing.
    """
    of_field: dict[str, list[Named]] = {}
    for entry in entries:
        path = entry.name.split("/")
        if len(path) > 1 and path[-1].isdigit():  # a tensor per side
            path = path[:-1]
        of_field.setdefault("/".join(path), []).append(entry)
    for entry in entries:
        if entry.kind == "any" or not entry.x.numel() or entry.x.is_meta:
            continue
        _, relation, field = parts_of(entry.kind)
        beside = of_field.get("/".join([*entry.name.split("/")[:-1], field]), []) if field else []
        others: list[Named | None] = [
            o for o in beside if relation == " of " or o.x.shape == entry.x.shape
        ]
        yield from [(entry, other) for other in others or [None]]


def _alike(pairs: Iterable[_Pair]) -> Iterator[list[_Pair]]:
    """Groups to check together: of equal kind, shapes, dtypes and devices, and not too large."""
    groups: dict[Any, list[_Pair]] = {}
    for pair in pairs:
        forms = [(entry.x.shape, entry.x.dtype, entry.x.device) for entry in pair if entry]
        groups.setdefault((pair[0].kind, pair[0].dtype, *forms), []).append(pair)
    for group in groups.values():
        size = max(1, _AT_A_TIME // max([entry.x.numel() for entry in group[0] if entry]))
        yield from [group[first : first + size] for first in range(0, len(group), size)]


def _rows(bad: Tensor) -> Tensor:
    """(n,): whether any of each entry's values is bad."""
    return bad.reshape(len(bad), -1).any(1)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The entries stacked; for DTensors, this rank's part."""
    return torch.stack([local_part(x).detach() for x in tensors])
