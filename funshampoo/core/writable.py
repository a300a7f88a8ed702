"""Whether a step can write to parameters, asked before it writes to anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.tree import flatten, leaf_names


def check_writable(params: Any, updates: Any) -> None:
    """Raise for a parameter that can't be added to in its own memory.

    Raises:
        ValueError: it requires gradients, or its gradient does, and autograd records; or it is
            expanded, so that entries share memory.
    """
    leaves = flatten(params)[0]
    if not all([p.is_contiguous() for p in leaves]):
        _check_apart(leaves, params)
    if torch.is_grad_enabled():
        _check_unrecorded(leaves, updates, params)


def _check_apart(leaves: Sequence[Tensor], params: Any) -> None:
    for i, p in enumerate(leaves):
        if p.layout is torch.strided and _repeats(p.shape, p.stride()):
            raise ValueError(
                f"parameter '{leaf_names(params)[i]}' has several entries in one place of memory "
                f"(shape {tuple(p.shape)}, strides {p.stride()}), as expand() makes them, so that "
                "it can't be written to: pass p.clone(), or what it was expanded from."
            )


def _repeats(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two indices may be one place; no where each stride steps over all smaller sides."""
    extent = 1
    if 0 in shape:
        return False
    for stride, side in sorted([(abs(s), n) for s, n in zip(strides, shape) if n > 1]):
        if stride < extent:
            return True
        extent += stride * (side - 1)
    return False


def _check_unrecorded(leaves: Sequence[Tensor], updates: Any, params: Any) -> None:
    for i, (p, g) in enumerate(zip(leaves, flatten(updates)[0])):
        if p.requires_grad and p.is_leaf:
            raise ValueError(
                f"parameter '{leaf_names(params)[i]}' requires gradients, and autograd lets nobody "
                "write to it: pass p.detach(), or step under torch.no_grad()."
            )
        if g is not None and g.requires_grad:
            raise ValueError(
                f"the gradient of '{leaf_names(params)[i]}' requires gradients itself, and "
                "autograd would record what is written: pass g.detach(), or step under "
                "torch.no_grad(). To differentiate through steps, use update and apply_updates."
            )
