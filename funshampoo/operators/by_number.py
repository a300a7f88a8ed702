"""An elementwise operation on leaves with one number each, in few launches.

torch's foreach operators process a list of 0-dimensional tensors one by one. On a GPU, where a
launch takes the host about ten microseconds, a hundred small leaves are concatenated instead, along
with their numbers, each repeated for all entries of its leaf: one operator for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.modes import constant

SMALL = 2**14
"""Largest leaf, in entries, that is concatenated with others."""

FEW = 4
"""Up to this many leaves, concatenating them saves no launches."""


def by_number(
    function: Callable[..., Tensor],
    xs: list[Tensor],
    numbers: Sequence[list[Tensor]],
    each: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """function(x, number, ...) for each leaf, for plain tensors (see `core.modes.is_plain`).

    Args:
        function: elementwise, of tensors of one shape.
        xs: of any shapes and dtypes.
        numbers: one list or more, each with a tensor per x, () or broadcastable to x.
        each: the same for lists, for the leaves that are not concatenated: with one value per
            block, on a CPU, large, or few.

    Returns:
        New tensors of the shapes of `xs`: bitwise those of `each`, since on a device an elementwise
        operation does not depend on an entry's position.
    """
    rows = _rows(xs, numbers)
    if not rows:
        return each(xs, *numbers)
    in_rows = {i for places in rows for i in places}
    others = [i for i in range(len(xs)) if i not in in_rows]
    found: list[Any] = [None] * len(xs)
    for places in [*rows, others] if others else rows:
        own, *their = [[column[i] for i in places] for column in (xs, *numbers)]
        new = each(own, *their) if places is others else _in_a_row(function, own, their)
        for i, x in zip(places, new):
            found[i] = x
    return found


def _in_a_row(
    function: Callable[..., Tensor], xs: list[Tensor], numbers: Sequence[list[Tensor]]
) -> list[Tensor]:
    sizes = tuple([x.numel() for x in xs])
    flat = torch.cat([x.reshape(-1) for x in xs])
    leaf = _leaf_of_entry(sizes, flat.device)
    spread = [torch.stack(column).index_select(0, leaf) for column in numbers]
    parts = torch.split(function(flat, *spread), list(sizes))
    return [part if x.ndim == 1 else part.view(x.shape) for part, x in zip(parts, xs)]


def _rows(xs: Sequence[Tensor], numbers: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Which leaves, by index, are concatenated."""
    if not xs or xs[0].is_cpu:  # the rest need not be looked at
        return []
    kinds: dict[Any, list[int]] = {}
    for i, (x, *own) in enumerate(zip(xs, *numbers)):
        alike = all([type(n) is Tensor and n.ndim == 0 and n.device == x.device for n in own])
        if alike and type(x) is Tensor and not x.is_cpu and 0 < x.numel() <= SMALL:
            kinds.setdefault((x.dtype, *[n.dtype for n in own], x.device), []).append(i)
    return [places for places in kinds.values() if len(places) > FEW]


@functools.partial(constant, most=8)  # one per pattern of missing gradients
def _leaf_of_entry(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(sum of sizes,) int32: the leaf of every entry. The copy to a device does not block."""
    counts = torch.tensor(sizes, device="cpu")
    leaves = torch.arange(len(sizes), dtype=torch.int32, device="cpu").repeat_interleave(counts)
    return leaves.to(device, non_blocking=True)
