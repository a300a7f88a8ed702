"""Whether a step can write to parameters, checked before any write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.parameters import NotAParameterError, problem_of
from funshampoo.core.tree import leaf_names

_OF_ALL_MEMBERS = (
    "parameter '{}' is one tensor for all members of vmap, and each member's step would be written "
    "to it: give each a copy, as torch.stack([p] * n) with in_dims 0, or take update's updates."
)


def check_writable(
    params: Any, leaves: Sequence[Any], gradients: Sequence[Any], state: Sequence[Tensor]
) -> None:
    """Raise for a parameter that can't be added to in place.

    Args:
        params: the tree, for the names of its leaves.
        leaves, gradients: what is in it, and a gradient or None for each.
        state: the tensors of the state.

    Raises:
        ValueError: it requires gradients, or its gradient or the state does, while autograd
            records; or it is expanded, so that entries share memory; or under vmap all members
            share it, and its gradient or the state is each member's own.
        TypeError: it is not a dense tensor of a real floating dtype, and has a gradient.
    """
    if torch.is_grad_enabled() and any([x.requires_grad for x in state]):
        raise ValueError(
            "the state requires gradients, as init makes it of parameters that do, and autograd "
            "would record what is written to it on every step: call init with p.detach(), or under "
            "torch.no_grad(). To differentiate through steps, use update and apply_updates."
        )
    mapped = _functorch.peek_interpreter_stack() is not None
    plain = not mapped and all([isinstance(p, Tensor) and p.is_floating_point() for p in leaves])
    if plain and all([p.is_contiguous() for p in leaves]):
        every = [x for x in (*leaves, *gradients) if x is not None]
        if not torch.is_grad_enabled() or not any([x.requires_grad for x in every]):
            return
    of_members = mapped and any(map(_functorch.is_batchedtensor, state))
    for i, (p, g) in enumerate(zip(leaves, gradients)):
        if g is None:  # nothing is written; and anything may be hidden by `masked`
            continue
        if problem := problem_of(p):
            raise NotAParameterError("update_in_place", leaf_names(params)[i], problem)
        is_own = of_members or (mapped and _functorch.is_batchedtensor(g))
        if is_own and not _functorch.is_batchedtensor(p):
            raise ValueError(_OF_ALL_MEMBERS.format(leaf_names(params)[i]))
        if problem := _problem_of_writing(p, g):
            raise ValueError(problem.format(leaf_names(params)[i]))


def _problem_of_writing(p: Tensor, g: Tensor | None) -> str:
    if not p.is_contiguous() and _repeats(p.shape, p.stride()):
        return (
            "parameter '{}' has several entries in one place of memory "
            f"(shape {tuple(p.shape)}, strides {p.stride()}), as expand() makes them, so that it "
            "can't be written to: pass p.clone(), or what it was expanded from."
        )
    if not torch.is_grad_enabled():
        return ""
    if p.requires_grad and p.is_leaf:
        return (
            "parameter '{}' requires gradients, and autograd lets nobody write to it: pass "
            "p.detach(), or step under torch.no_grad()."
        )
    if g is not None and g.requires_grad:
        return (
            "the gradient of '{}' requires gradients itself, and autograd would record what is "
            "written: pass g.detach(), or step under torch.no_grad(). To differentiate through "
            "steps, use update and apply_updates."
        )
    return ""


def _repeats(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two indices may share memory; no if each stride steps over all smaller sides."""
    extent = 1
    if 0 in shape:
        return False
    for stride, side in sorted([(abs(s), n) for s, n in zip(strides, shape) if n > 1]):
        if stride < extent:
            return True
        extent += stride * (side - 1)
    return False
