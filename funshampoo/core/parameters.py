"""Which parameters and gradients can be optimized, and errors that name those that can't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from funshampoo.core.interrupted import tensors_of
from funshampoo.core.placed import is_in_parts
from funshampoo.core.tree import cast, compute_dtype, flatten, leaf_names

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_LAZY = (
    "has no shape yet, as those of lazy layers (LazyLinear, ...) before their first forward. "
    "Run the model once on a batch, then make the state."
)


_FSDP1 = ("_is_flat_param", "_fsdp_flattened")  # its marks; the second with use_orig_params=True


def detached(p: Tensor) -> Tensor:
    """p.detach(), still recognizable as a lazy layer's, or as a part of FSDP1's.

    >>> detached(torch.nn.Parameter(torch.zeros(2))).requires_grad
    False
    """
    if is_lazy(p):
        return p
    found = p.detach()
    for mark in _FSDP1:
        if getattr(p, mark, False):
            setattr(found, mark, True)
    return found


def unrecorded(params: Any, gradients: Any) -> Any:
    """The parameters of a step; a module's without autograd, unless a gradient records it.

    They require gradients in any case. In a loop that steps outside torch.no_grad(), decay and
    averages of weights would keep every step's graph in the state.
    """
    if params is None or not torch.is_grad_enabled():
        return params
    leaves, spec = flatten(params)
    if any([isinstance(g, Tensor) and g.requires_grad for g in flatten(gradients)[0]]):
        return params
    return spec.unflatten(detached_parameters(leaves))


def is_recorded(gradients: Sequence[Any], state: Any) -> bool:
    """Whether autograd records a step on these: backward needs the old values of what it writes."""
    if not torch.is_grad_enabled():
        return False
    return any([x.requires_grad for x in (*gradients, *tensors_of(state)) if x is not None])


def detached_parameters(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors, with a module's detached, since those require gradients in any case.

    For `init`: a state made from them would keep the graph of every later step.
    """
    return [detached(p) if isinstance(p, Parameter) else p for p in tensors]


class NotAParameterError(TypeError):
    """A leaf is not a dense tensor of a real floating dtype.

    Attributes:
        leaf, problem: its name, and what it is.
    """

    def __init__(self, stage: str, leaf: str, problem: str) -> None:
        super().__init__(
            f"{stage}: parameter '{leaf}' {problem}; only dense tensors of a real floating dtype "
            "can be optimized. Leave it out of the tree, or wrap the whole chain in masked(...) to "
            "hide it; of a module, give dict(module.named_parameters())."
        )
        self.leaf, self.problem = leaf, problem


class UnfitLeafError(ValueError):
    """A stage can't use a leaf, or a stack of blocks, for which `blocked` names the parameter.

    Args:
        text: the problem, with {} in place of the name.
        leaf: its name.
    """

    def __init__(self, text: str, leaf: str) -> None:
        super().__init__(text.format(leaf))
        self.text, self.leaf = text, leaf


def check_parameters(params: Any, stage: str) -> None:
    """Check that every leaf is a dense tensor of a real floating dtype.

    Raises:
        TypeError: names the leaf, what it is, and how to leave it out.
    """
    leaves, _ = flatten(params)
    for i, leaf in enumerate(leaves):
        if is_lazy(leaf):
            raise TypeError(f"{stage}: parameter '{leaf_names(params)[i]}' {_LAZY}")
        problem = problem_of(leaf)
        if problem:
            raise NotAParameterError(stage, leaf_names(params)[i], problem)


def check_tensors(params: Any, stage: str) -> None:
    """Check that every leaf is a tensor, so that a function can decide which part gets it.

    Raises:
        TypeError: as `check_parameters`.
    """
    for i, leaf in enumerate(flatten(params)[0]):
        if not isinstance(leaf, Tensor):
            raise NotAParameterError(stage, leaf_names(params)[i], problem_of(leaf))


def check_local(params: Any, stage: str, parts: bool = False) -> None:
    """`check_parameters`, and a check that leaves are whole, for blocks and factor matrices.

    DTensors are not whole, nor are FSDP1's parameters.

    Args:
        parts: whether DTensors can be assembled.

    Raises:
        TypeError: names the leaf and the remedy.
    """
    check_parameters(params, stage)
    for i, leaf in enumerate(flatten(params)[0]):
        if is_in_parts(leaf) and not parts:
            raise TypeError(
                f"{stage}: parameter '{leaf_names(params)[i]}' is a DTensor, as FSDP2 and tensor "
                "parallelism make them, of which a rank has a part. Its blocks are put together in "
                "blocked(sharded(...)), where a recipe has this stage; or give the local tensors "
                "(p.to_local(), and their gradients'), each with blocks of its own."
            )
        if any([getattr(leaf, mark, False) for mark in _FSDP1]):
            raise TypeError(
                f"{stage}: parameter '{leaf_names(params)[i]}' is one of FullyShardedDataParallel "
                "(FSDP1): a flat part, without the rows and columns that factor matrices are "
                "about. Train with fully_shard (FSDP2), or with DistributedDataParallel and "
                "distribute=sharded, which shards the state; or with an elementwise method such as "
                "funshampoo.adamw."
            )


def problem_of(leaf: Any) -> str:
    """Why this can't be optimized; "" for a dense tensor of a real floating dtype."""
    if leaf is None:
        return "is None"
    if not isinstance(leaf, Tensor):
        return f"is of type {type(leaf).__name__}, not a tensor"
    if leaf.layout is not torch.strided:
        return f"is sparse ({leaf.layout})"
    if leaf.dtype not in _DTYPES:
        kind = "complex" if leaf.is_complex() else "not of a dtype that can be optimized"
        integral = not leaf.is_complex() and not leaf.is_floating_point()
        return f"is {'an integer or bool tensor' if integral else kind} ({leaf.dtype})"
    return ""


class NotAGradientError(TypeError, RuntimeError):
    """A gradient is sparse, no tensor or elsewhere: to torch.optim's users, a RuntimeError."""


def check_gradients(gradients: Sequence[Any], parameters: Sequence[Any], tree: Any) -> bool:
    """Check that each is None, or a dense real floating tensor of its parameter's shape and device.

    Args:
        tree: of the gradients, for their names.

    Returns:
        Whether one has another dtype than its parameter.

    Raises:
        NotAGradientError: one is no dense tensor, or is on another device.
        TypeError: one is not of a real floating dtype.
        ValueError: one has another shape.
    """
    unlike = False
    for i, (g, p) in enumerate(zip(gradients, parameters)):
        known = isinstance(p, Tensor) and p.dtype in _DTYPES  # else it is reported later
        if g is None or (isinstance(g, Tensor) and not known):
            continue
        fits = isinstance(g, Tensor) and g.layout is torch.strided and g.device == p.device
        if not fits:
            raise NotAGradientError(
                f"the gradient of '{leaf_names(tree)[i]}' {_problem_of_gradient(g, p)}."
            )
        if g.shape != p.shape:
            raise ValueError(
                f"leaf '{leaf_names(tree)[i]}' has shape {tuple(p.shape)} in params and "
                f"{tuple(g.shape)} in gradients: give the gradient in its parameter's shape."
            )
        if g.dtype is p.dtype:
            continue
        unlike = True
        if g.is_complex():
            raise TypeError(
                f"leaf '{leaf_names(tree)[i]}' is complex in gradients, and real in params: give "
                "the real part, or torch.view_as_real of both."
            )
        if g.dtype not in _DTYPES:
            raise TypeError(
                f"the gradient of '{leaf_names(tree)[i]}' is of {g.dtype}, its parameter of "
                f"{p.dtype}: give it in a real floating dtype."
            )
    return unlike


def as_entering(updates: Any, params: Any, casts: bool, ascends: bool = False) -> Any:
    """The gradients in the form that a step takes, in new memory if they are not already.

    Args:
        casts: whether to convert those of another dtype to their parameters' compute dtype.
            DTensors stay as they are: ranks exchange them in their own dtype.
        ascends: whether to negate them.
    """
    leaves, spec = flatten(updates)

    def entering(g: Any, p: Any) -> Any:  # leaf by leaf, so that two full copies never coexist
        if g is None:
            return None
        if casts and isinstance(p, Tensor) and p.dtype in _DTYPES and not is_in_parts(g):
            g = cast(g, compute_dtype(p)) if g.dtype is not p.dtype else g
        return -g if ascends else g

    return spec.unflatten(map(entering, leaves, flatten(params)[0]))


def _problem_of_gradient(g: Any, p: Tensor) -> str:
    if not isinstance(g, Tensor):
        return f"is no tensor but of type {type(g).__name__}: make it one, torch.as_tensor(...)"
    if g.layout is not torch.strided:
        return (
            f"is sparse ({g.layout}): build its layer with sparse=False, or give this parameter to "
            "torch.optim.SparseAdam"
        )
    return f"is on {g.device}, the parameter on {p.device}: move it there"
