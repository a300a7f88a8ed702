"""Rescaling leaves or blocks to other lengths, even if squares leave the dtype's range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.linalg.norms import block_norms, range_limits, range_scale, stand
from funshampoo.operators.columns import (
    Column,
    in_compute_dtype,
    per_block,
    plus,
    product,
    quotient,
)


def take_lengths(
    leaves: list[Any],
    directions: list[Any],
    block_ndim: int,
    least_order: int,
    begun: Tensor | None,
) -> None:
    """Replace the leaves, or their blocks, by directions of the same lengths.

    Args:
        leaves: P_g, a list that is written to; None stays.
        directions: P; where it is None, there is no direction, and the leaf becomes None.
        least_order: leaves with fewer sides stay.
        begun: (), bool: if False, all leaves stay; None means True.
    """
    places = []
    for i, (x, direction) in enumerate(zip(leaves, directions)):
        if x is not None and x.ndim - block_ndim >= least_order:
            if direction is None:  # a length without a direction is no step
                leaves[i] = None
            else:
                places.append(i)
    if not places:
        return
    partners = in_compute_dtype(map(leaves.__getitem__, places))
    lengths, plain = _lengths_of(partners, block_ndim)
    if begun is None:  # as large as P, and no longer needed
        del partners
        for i in places:
            leaves[i] = None
    found = _of_length(
        in_compute_dtype(map(directions.__getitem__, places)), lengths, plain, block_ndim
    )
    for i, x in zip(places, found):
        # In torch.compile the counter is a tensor without a value.
        leaves[i] = x if begun is None else torch.where(begun.to(x.device), x, leaves[i])


_SMALL = 1e-16  # added to ‖P‖, as in the Distributed Shampoo reference


def _lengths_of(p_g: Column, block_ndim: int) -> tuple[Column, bool]:
    """‖P_g‖, at most the largest number; NaN if an entry is infinite.

    Also whether these are plain norms, none of which is out of range.
    """
    norms = block_norms(p_g, block_ndim)
    if stand(norms, p_g):
        return norms, True
    if not _alike(norms):
        return [_lengths_of([x], block_ndim)[0][0] for x in p_g], False
    scale = range_scale(_joined(norms))
    scaled = product(p_g, per_block(_parted(scale, norms), p_g))
    length = _nan_if_infinite(_joined(block_norms(scaled, block_ndim))) / scale
    return _parted(torch.clamp(length, max=torch.finfo(length.dtype).max), norms), False


def _of_length(p: Column, lengths: Column, plain: bool, block_ndim: int) -> Column:
    """P length / (‖P‖ + 1e-16); `plain` as in `_lengths_of`."""
    norms = block_norms(p, block_ndim)
    if plain and stand(norms, p):
        ratio = quotient(lengths, plus(norms, _SMALL))
        return product(p, per_block(ratio, p))
    if not (_alike(norms) and _alike(lengths)):
        return [_of_length([x], [n], False, block_ndim)[0] for x, n in zip(p, lengths)]
    length, scale = _joined(lengths), range_scale(_joined(norms))
    p = product(p, per_block(_parted(scale, norms), p))
    divisor = _nan_if_infinite(_joined(block_norms(p, block_ndim))) + _SMALL * scale
    # The quotient of the two may be out of range although the product of all three is not.
    least, most = range_limits(length.dtype)
    usual = (scale == 1) & (length >= least) & (length <= most)
    first = torch.where(usual, length, 1.0) / divisor
    second = torch.where(usual, 1.0, length)
    p = product(p, per_block(_parted(first, norms), p))
    return product(p, per_block(_parted(second, norms), p))


def _nan_if_infinite(norm: Tensor) -> Tensor:
    return norm + norm * 0.0


def _alike(norms: Column) -> bool:
    """Whether these can be joined into one tensor: a few operators, however many leaves."""
    return len({(norm.dtype, norm.device) for norm in norms}) == 1


def _joined(norms: Column) -> Tensor:
    return torch.cat(norms) if norms[0].ndim else torch.stack(norms)


def _parted(joined: Tensor, norms: Column) -> Column:
    """One value for each of the joined norms."""
    if norms[0].ndim:
        return list(torch.split(joined, [len(norm) for norm in norms]))
    return list(joined.unbind())
