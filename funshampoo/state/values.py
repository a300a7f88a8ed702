"""Values that no run can have left in a state: what of a damaged checkpoint can be told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funshampoo.core.modes import full_precision
from funshampoo.operators.packed import unpack
from funshampoo.state.meaning import parts_of

_AT_A_TIME = 2**24  # numbers that are looked at together
_RANGE = re.compile(r"([\[(])([^\s,]+), ([^\s,\])]+)([\])])")  # as in "number [0.0, 1.0)"
_OFF_ORTHONORMAL = 0.1  # an entry of QQᵀ - I: rounding leaves a hundredth of it, in bfloat16 too
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
            for bad, reason in _faults(parts_of(some[0].kind)[0], values, limit):
                for i in torch.nonzero(bad).flatten().tolist():
                    found.setdefault(some[i].name, reason)
    pairs = list(_related(entries))
    found.update(_in_excess([pair for pair in pairs if pair.relation == " <= "]))
    found.update(_without_weight([pair for pair in pairs if pair.relation == " of "]))
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
    if kind == "orthonormal":
        Q = x if x.dtype == torch.float64 else x.float()
        with full_precision():
            gram = Q @ Q.mT
        there = (Q != 0).any(-1)  # a coordinate that no gradient has touched has a row of zeros
        off = (gram - there.to(Q.dtype).diag_embed()).abs() > _OFF_ORTHONORMAL
        yield rows(off) | rows(~there.any(-1)), "has rows that are not orthonormal"
    if kind == "factor":
        L = unpack(x)
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        yield rows(diagonal < 0), "is negative on the diagonal, as no sum of squares is"
        root = (diagonal.clamp(min=0) + torch.finfo(L.dtype).tiny).sqrt()
        # Twice the bound: the average is rounded on every step.
        beyond = L.abs() > 2 * root.unsqueeze(-1) * root.unsqueeze(-2)
        yield rows(beyond), "has an entry above √(L_ii L_jj), as no sum of A Aᵀ has"


class _Pair(NamedTuple):
    """An entry and one of the field that its kind names; see `meaning`."""

    entry: Entry
    relation: str
    other: Entry
    field: str


def _related(entries: Sequence[Entry]) -> Iterator[_Pair]:
    of_field: dict[str, list[Entry]] = {}
    for entry in entries:
        path = entry.name.split("/")
        if len(path) > 1 and path[-1].isdigit():  # of a side
            path = path[:-1]
        of_field.setdefault("/".join(path), []).append(entry)
    for entry in entries:
        _, relation, field = parts_of(entry.kind)
        if relation and not entry.x.is_meta:
            beside = "/".join([*entry.name.split("/")[:-1], field])
            for other in of_field.get(beside, ()):
                yield _Pair(entry, relation, other, field)


def _alike(pairs: Sequence[_Pair]) -> Iterator[tuple[list[_Pair], Tensor, Tensor]]:
    """Pairs of entries that can be looked at together, and the two stacks of their values."""
    groups: dict[tuple[object, ...], list[_Pair]] = {}
    for pair in pairs:
        x, y = pair.entry.x, pair.other.x
        key = (x.shape, x.dtype, x.device, y.shape, y.dtype, y.device)
        groups.setdefault(key, []).append(pair)
    for group in groups.values():
        size = max(1, _AT_A_TIME // max(1, group[0].other.x.numel()))
        for first in range(0, len(group), size):
            some = group[first : first + size]
            yield (
                some,
                torch.stack([_local(pair.entry.x) for pair in some]),
                torch.stack([_local(pair.other.x) for pair in some]),
            )


def _in_excess(pairs: Sequence[_Pair]) -> Iterator[tuple[str, str]]:
    """Counts that are above the field beside them that bounds them."""
    same = [pair for pair in pairs if pair.entry.x.shape == pair.other.x.shape]
    for group, small, large in _alike(same):
        bad = (small > large.to(small.device)).reshape(len(group), -1).any(1)
        for i in torch.nonzero(bad).flatten().tolist():
            yield group[i].entry.name, f"is above its '{group[i].field}'"


def _without_weight(pairs: Sequence[_Pair]) -> Iterator[tuple[str, str]]:
    """Weights of 0 beside averages in which something is."""
    for group, weight, average in _alike(pairs):
        full = (average != 0).reshape(len(group), -1).any(1)
        bad = (weight == 0).reshape(len(group), -1).any(1) & full.to(weight.device)
        for i in torch.nonzero(bad).flatten().tolist():
            yield group[i].entry.name, f"is 0, while its '{group[i].field}' is not"


def _local(x: Tensor) -> Tensor:
    """Of a DTensor what this rank has."""
    return x.to_local().detach() if hasattr(x, "to_local") else x.detach()
