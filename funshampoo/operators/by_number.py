"""An elementwise operation of every leaf with a number of its own, in few launches.

torch's foreach operators take a list of 0-dimensional tensors one by one. On a GPU, where a launch
takes a host about ten microseconds, a hundred small leaves are put in a row instead, beside a row
in which every number stands as often as its leaf has entries: one operator for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.modes import constant

SMALL = 2**14
"""Entries of a leaf that is put in a row with others."""

_FEW = 4
"""Leaves for which it is as many launches without."""


def by_number(
    function: Callable[[Tensor, Tensor], Tensor],
    xs: list[Tensor],
    numbers: list[Tensor],
    each: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """function(x, number) of each pair, for plain tensors (see `core.modes.is_plain`).

    Args:
        function: elementwise, of two tensors of one shape.
        xs: of any shapes and dtypes.
        numbers: () each, or what broadcasts over its x.
        each: the same of lists, for the leaves that are not put in a row: of one value a block, on
            a CPU, of many entries, or few.

    Returns:
        New tensors of the shapes of `xs`: bit for bit those of `each`, as an elementwise operation
        on a device does not ask where an entry lies.
    """
    rows = [] if not xs or xs[0].is_cpu else _rows(xs, numbers)
    if not rows:
        return each(xs, numbers)
    found: list[Any] = [None] * len(xs)
    for places in rows:
        sizes = tuple([xs[i].numel() for i in places])
        flat = torch.cat([xs[i].reshape(-1) for i in places])
        index = _leaf_of_entry(sizes, flat.device)
        spread = torch.stack([numbers[i] for i in places]).index_select(0, index)
        for i, own in zip(places, torch.split(function(flat, spread), list(sizes))):
            found[i] = own if xs[i].ndim == 1 else own.view(xs[i].shape)
    others = [i for i, x in enumerate(found) if x is None]
    if others:
        rest = each([xs[i] for i in others], [numbers[i] for i in others])
        for i, x in zip(others, rest):
            found[i] = x
    return found


def _rows(xs: Sequence[Tensor], numbers: Sequence[Tensor]) -> list[list[int]]:
    """Which leaves, by index, are put in a row together."""
    kinds: dict[Any, list[int]] = {}
    for i, (x, number) in enumerate(zip(xs, numbers)):
        own = type(x) is type(number) is Tensor and number.ndim == 0 and x.device == number.device
        if own and not x.is_cpu and 0 < x.numel() <= SMALL:
            kinds.setdefault((x.dtype, number.dtype, x.device), []).append(i)
    return [places for places in kinds.values() if len(places) > _FEW]


@constant
def _leaf_of_entry(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(sum of sizes,) int64: which leaf an entry is of. Made once, by a copy from the host."""
    leaves = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return leaves.to(device)


def all_at_once(function: Callable[[Tensor], Tensor], xs: list[Tensor]) -> list[Tensor]:
    """An elementwise function of each of these small tensors of one dtype and device."""
    if len(xs) < 2:
        return [function(x) for x in xs]
    flat = function(torch.cat([x.reshape(-1) for x in xs]))
    parts = torch.split(flat, [x.numel() for x in xs])
    return [part.reshape(x.shape) for part, x in zip(parts, xs)]
