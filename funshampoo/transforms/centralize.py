"""Gradient centralization: each output's gradient gets mean zero over its inputs."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.operators.leafwise import leafwise


def centralize() -> GradientTransformation:
    """Gradient centralization: subtract the mean over all sides but the first.

    Vectors and scalars stay as they are. In `blocked` the means are those of the blocks.

    Reference: Yong et al., arXiv 2004.01461.

    >>> import torch
    >>> w = {"w": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "b": torch.ones(2)}
    >>> centralize().update(w, ())[0]
    {'w': tensor([[-1.,  1.],
            [ 0.,  0.]]), 'b': tensor([1., 1.])}
    """

    def centred(u: Tensor, block_ndim: int) -> Tensor:
        if u.ndim < block_ndim + 2 or not u.numel():
            return u
        return u - u.mean(tuple(range(block_ndim + 1, u.ndim)), keepdim=True)

    return leafwise(centred)
