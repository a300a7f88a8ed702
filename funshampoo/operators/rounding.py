"""Stochastic rounding, with random bits derived from the values themselves.

A generator would have to be stored, split over ranks and ensemble members, and moved to the device.
Here the random bits of an entry are a hash of its own numbers. So they are the same wherever it is:
in a block, on another rank, in one model of an ensemble, in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EXPONENT = 0x7F800000
"""The exponent bits of a float32."""

_BITS = 24
"""Random bits per entry: float32's significant bits, all needed below float16's normal numbers."""


def random_bits(sources: Sequence[Tensor], salt: Tensor) -> Tensor:
    """int32 with 32 random bits per entry: a hash of the sources' entries there, and of the salt.

    Args:
        sources: float32, of one shape.
        salt: int32, of that shape or one that broadcasts to it.
    """
    mixed = salt * 0x27D4EB2D
    for x in sources:
        mixed = (mixed ^ x.view(torch.int32)) * 0x2545F491  # products wrap around
    for multiplier, shift in ((0x7FEB352D, 16), (-0x7B935975, 15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * multiplier
    found: Tensor = mixed ^ _shifted(mixed, 16)
    return found


def _shifted(x: Tensor, places: int) -> Tensor:
    """Logical right shift: zeros come in, whatever the sign."""
    # Not x >> places, with which torch 2.13 can't shift DTensors.
    found: Tensor = torch.bitwise_right_shift(x, places) & (2 ** (32 - places) - 1)
    return found


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), of the last bits of each entry: float16 could not hold their numbers."""
    # A product of integers and a Python number would be of the default dtype, whatever that is.
    found: Tensor = (bits & (2**_BITS - 1)).to(torch.float32) * 2.0**-_BITS
    return found


def rounded_at_random(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """x rounded to `dtype`: up with a probability equal to its fraction of the step, else down.

        step = 2^⌊log2 |x|⌋ ε,   q = x / step,   x ← step (⌊q⌋ + [r < q - ⌊q⌋])

    with r uniform in [0, 1). So its expectation is x. Numbers that `dtype` represents exactly stay
    as they are.

    Args:
        x: float32; non-finite entries are returned unchanged.
        dtype: torch.bfloat16 or torch.float16.
        bits: int32, random; of x's shape.

    Returns:
        float32 with values that `dtype` represents, except above its largest.
    """
    info = torch.finfo(dtype)
    # Below float16's smallest normal number all steps are equal; float32's may be flushed to 0.
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny)
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)
    step = (power * info.eps).clamp(min=least)
    scaled = x / step
    below = scaled.floor()
    r = uniform(bits)
    return torch.where(power < torch.inf, (below + (r < scaled - below)) * step, x)
