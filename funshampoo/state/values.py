"""Values that no run can have produced: the detectable damage in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

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
    looked_at = [e for e in entries if e.kind != "any" and e.x.numel() and not e.x.is_meta]
    for some in _alike(looked_at, lambda e: (e.kind, e.dtype), lambda e: [e.x]):
        values = _stacked([entry.x for entry in some]).to(some[0].dtype)
        for bad, reason in _faults(parts_of(some[0].kind)[0], values, limit):
            for i in torch.nonzero(bad).flatten().tolist():
                found.setdefault(some[i].name, reason)
    found.update(_beside(list(_related(entries))))
    return [f"'{name}' {reason}" for name, reason in found.items()]


def _faults(kind: str, x: Tensor, limit: int | None) -> Iterator[tuple[Tensor, str]]:
    """((n,) bool, what is wrong there) for n entries of one kind, (n, ...)."""
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


class _Pair(NamedTuple):
    """An entry, and the entry of the field that its kind names; see `meaning`."""

    entry: Named
    relation: str
    other: Named
    field: str


def _related(entries: Sequence[Named]) -> Iterator[_Pair]:
    of_field: dict[str, list[Named]] = {}
    for entry in entries:
        path = entry.name.split("/")
        if len(path) > 1 and path[-1].isdigit():  # a tensor per side
            path = path[:-1]
        of_field.setdefault("/".join(path), []).append(entry)
    for entry in entries:
        _, relation, field = parts_of(entry.kind)
        if relation and not entry.x.is_meta:
            beside = "/".join([*entry.name.split("/")[:-1], field])
            for other in of_field.get(beside, ()):
                yield _Pair(entry, relation, other, field)


def _beside(pairs: Sequence[_Pair]) -> Iterator[tuple[str, str]]:
    """Counts above the field that bounds them, and weights of 0 for nonzero averages.

    A bound with another shape belongs to other blocks, and says nothing.
    """
    same = [p for p in pairs if p.relation == " of " or p.entry.x.shape == p.other.x.shape]
    for some in _alike(same, lambda p: (p.relation,), lambda p: [p.entry.x, p.other.x]):
        x, y = _stacked([p.entry.x for p in some]), _stacked([p.other.x for p in some])
        if some[0].relation == " <= ":
            bad, reason = _rows(x > y.to(x.device)), "is above its '{}'"
        else:
            bad, reason = _rows(x == 0) & _rows(y != 0).to(x.device), "is 0, while its '{}' is not"
        for i in torch.nonzero(bad).flatten().tolist():
            yield some[i].entry.name, reason.format(some[i].field)


_Item = TypeVar("_Item")


def _alike(
    items: Sequence[_Item],
    key: Callable[[_Item], tuple[object, ...]],
    tensors: Callable[[_Item], list[Tensor]],
) -> Iterator[list[_Item]]:
    """Groups to check together: of equal key and kind of tensors, and not too large."""
    groups: dict[tuple[object, ...], list[_Item]] = {}
    for item in items:
        kinds = [(x.shape, x.dtype, x.device) for x in tensors(item)]
        groups.setdefault((*key(item), *kinds), []).append(item)
    for group in groups.values():
        size = max(1, _AT_A_TIME // max(1, tensors(group[0])[-1].numel()))
        yield from [group[first : first + size] for first in range(0, len(group), size)]


def _rows(bad: Tensor) -> Tensor:
    """(n,): whether any of each entry's values is bad."""
    return bad.reshape(len(bad), -1).any(1)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The entries stacked; for DTensors, this rank's part."""
    return torch.stack([local_part(x).detach() for x in tensors])
