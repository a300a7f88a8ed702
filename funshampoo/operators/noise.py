"""Random numbers without a generator, whose state would be no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funshampoo.operators.rounding import random_bits, uniform


def random_normal(shape: Sequence[int], seed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pseudo-random numbers (*seed.shape, *shape), normally distributed with mean 0, variance 1.

    An entry is a hash of the seed and of its index in `shape`, so it is the same on any rank, in an
    ensemble, after a resumption and, up to rounding, in a graph. With the context's `clock` as
    seed, every step has new numbers, the same for all blocks of one shape.

    Args:
        shape: of a block.
        seed: integers, on the device of the result: (), or (N,) for other numbers in each row.
        dtype: of the result; the numbers have 24 random bits.

    >>> both = random_normal((2, 3), torch.tensor([7, 8]))
    >>> torch.equal(both[1], random_normal((2, 3), torch.tensor(8)))
    True
    """
    index = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device)
    salts = 2 * seed.to(torch.int32)[..., None]
    # In (0, 1), of which the logarithm is finite.
    u, v = [
        uniform(random_bits([index.view(torch.float32)], salts + i)) + 2.0**-25 for i in range(2)
    ]
    normal = (-2 * u.log()).sqrt() * torch.cos(2 * math.pi * v)  # Box and Muller, 1958
    return normal.reshape((*seed.shape, *shape)).to(dtype)
