"""Values that no run can have left in a state: what of a damaged checkpoint can be told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.operators.packed import unpack

_AT_A_TIME = 2**24  # numbers that are looked at together
_RANGE = re.compile(r"([\[(])([^\s,]+), ([^\s,\])]+)([\])])")  # as in "number [0.0, 1.0)"
_ABOVE_ONE = 1.01  # of a weight: a long average's rounds to a little above 1


class Entry(NamedTuple):
    """A tensor of a state under its name.

    Attributes:
        kind: what it means; see `funshampoo.state.meaning`.
        dtype: that it will have.
    """

    name: str
    kind: str
    x: Tensor
    dtype: torch.dtype


def problems(entries: Sequence[Entry], limit: int | None) -> list[str]:
    """What is wrong with these values: "'w/trace/buffer' is not finite", one line an entry.

    Entries of a shape and a meaning are looked at together. Waits for the device.

    Args:
        limit: what no count can be above; None where that is not known.
    """
    alike: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        x = entry.x
        if entry.kind != "any" and x.numel() and not x.is_meta:
            key = (entry.kind, x.shape, x.dtype, x.device, entry.dtype)
            alike.setdefault(key, []).append(entry)
    found: dict[str, str] = {}
    for group in alike.values():
        size = max(1, _AT_A_TIME // group[0].x.numel())
        for first in range(0, len(group), size):
            some = group[first : first + size]
            values = torch.stack([_local(entry.x) for entry in some]).to(some[0].dtype)
            for bad, reason in _faults(some[0].kind.partition(" <= ")[0], values, limit):
                for i in torch.nonzero(bad).flatten().tolist():
                    found.setdefault(some[i].name, reason)
    found.update(_in_excess({entry.name: entry for entry in entries}))
    return [f"'{name}' {reason}" for name, reason in found.items()]


def _faults(kind: str, x: Tensor, limit: int | None) -> Iterator[tuple[Tensor, str]]:
    """((n,) bool, what is wrong there) of n entries of one kind, (n, ...)."""

    def rows(bad: Tensor) -> Tensor:
        return bad.reshape(len(x), -1).any(1)

    if kind.startswith("number"):
        yield rows(x.isnan()), "is NaN"
        for left, low, high, right in _RANGE.findall(kind):
            above = x > float(low) if left == "(" else x >= float(low)
            below = x < float(high) if right == ")" else x <= float(high)
            yield rows(~(above & below)), f"is not in {left}{low}, {high}{right}, as it has to be"
        return
    if x.is_floating_point() or x.is_complex():
        yield rows(~torch.isfinite(x)), "is not finite"
    if kind in ("steps", "count", "weight", "nonnegative"):
        yield rows(x < 0), "is negative"
    if kind == "weight":
        yield rows(x > _ABOVE_ONE), "is above 1, as no weight of an average is"
    if kind == "count" and limit is not None:
        yield rows(x > limit), f"is above the clock, which is at {limit}"
    if kind == "factor":
        L = unpack(x)
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        yield rows(diagonal < 0), "is negative on the diagonal, as no sum of squares is"
        root = (diagonal.clamp(min=0) + torch.finfo(L.dtype).tiny).sqrt()
        # Twice the bound: the average is rounded on every step.
        beyond = L.abs() > 2 * root.unsqueeze(-1) * root.unsqueeze(-2)
        yield rows(beyond), "has an entry above √(L_ii L_jj), as no sum of A Aᵀ has"


def _in_excess(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Counts that are above the field beside them that bounds them."""
    pairs: dict[tuple[object, ...], list[tuple[Entry, Entry, str]]] = {}
    for entry in entries.values():
        _, _, field = entry.kind.partition(" <= ")
        other = entries.get("/".join([*entry.name.split("/")[:-1], field])) if field else None
        if other is not None and other.x.shape == entry.x.shape and not entry.x.is_meta:
            key = (entry.x.shape, entry.x.device, other.x.device)
            pairs.setdefault(key, []).append((entry, other, field))
    for group in pairs.values():
        small = torch.stack([_local(entry.x) for entry, _, _ in group])
        large = torch.stack([_local(other.x) for _, other, _ in group]).to(small.device)
        bad = (small > large).reshape(len(group), -1).any(1)
        for i in torch.nonzero(bad).flatten().tolist():
            yield group[i][0].name, f"is above its '{group[i][2]}'"


def _local(x: Tensor) -> Tensor:
    """Of a DTensor what this rank has."""
    return x.to_local().detach() if hasattr(x, "to_local") else x.detach()
