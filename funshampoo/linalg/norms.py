"""Norms of blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def block_norm(x: Tensor, block_ndim: int) -> Tensor:
    """‖x‖ per block: (N,) of x (N, ...) where block_ndim is 1, () where it is 0.

    >>> block_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 1)
    tensor([5., 1.])
    """
    flat = x.reshape(*x.shape[:block_ndim], -1)
    if flat.shape[-1] == 1:  # in a graph, torch 2.8 takes the norm of one number for (N, 1)
        return flat[..., 0].abs()
    norm: Tensor = torch.linalg.vector_norm(flat, dim=-1)
    return norm
