"""The identity, as a grafting partner: SGD."""

from __future__ import annotations

from funshampoo.core.contract import GradientTransformation, identity, renamed


def scale_by_sgd() -> GradientTransformation:
    """The identity. As a grafting partner it gives P the norm of the (filtered) gradient.

    >>> import torch
    >>> scale_by_sgd().update({"w": torch.ones(1)}, ())[0]
    {'w': tensor([1.])}
    """
    return renamed(identity(), "scale_by_sgd")
