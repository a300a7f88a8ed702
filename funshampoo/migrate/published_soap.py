"""The published kinds of SOAP, by their constructors' arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import partition
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, stateless
from funshampoo.core.tree import map_leaves, update_leaves
from funshampoo.migrate.channels_last import channels_second
from funshampoo.migrate.words import chosen
from funshampoo.operators.leaf_ops import per_block
from funshampoo.recipes.routing import whole
from funshampoo.state.nodes import find_state
from funshampoo.transforms import (
    add_decayed_weights,
    ema,
    in_eigenbasis,
    kronecker_statistics,
    scale_by_learning_rate,
    scale_by_rms,
)
from funshampoo.transforms.eigenbasis import EigenbasisState


def soap(
    *,
    lr: Hyper | Schedule = 3e-3,
    betas: Sequence[float] = (0.95, 0.95),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
) -> GradientTransformation:
    """SOAP of nikhilvyas/SOAP: a whole parameter is a block, large sides are left alone.

    `data_format` says in which order `merge_dims` walks the sides of a kernel, and nothing without.
    """
    formats = {"channels_first": False, "channels_last": merge_dims}
    permutes = chosen("data_format", data_format, formats)
    beta1, beta2 = betas
    check_range("shampoo_beta", shampoo_beta, float("-inf"), 1.0)

    def directions(wanted: bool) -> GradientTransformation:
        def sides(block: tuple[int, ...]) -> list[bool]:
            return [wanted and d <= max_precond_dim for d in block]

        adam = chain(ema(beta1, bias_correction=False), scale_by_rms(beta2, eps))
        statistics = kronecker_statistics(
            beta2 if shampoo_beta < 0 else shampoo_beta, bias_correction=False, sides=sides
        )
        turned = in_eigenbasis(adam, precondition_frequency, offset=1)
        stages = [statistics, turned, *([unit_rms()] if normalize_grads else [])]
        corrected = [_corrected(betas)] if correct_bias else []
        merge: Any = _merged(max_precond_dim) if merge_dims and wanted else "none"
        inner = chain(*stages, *corrected, *decayed_steps(lr, weight_decay))
        blocks = whole(inner, 20, None, merge=merge)
        return channels_second(blocks) if permutes and wanted else blocks

    def labels(tree: Tree) -> Tree:
        return map_leaves(lambda p: "vectors" if p.ndim == 1 else "others", tree)

    return partition({"vectors": directions(precondition_1d), "others": directions(True)}, labels)


def decayed_steps(lr: Hyper | Schedule, weight_decay: float) -> tuple[GradientTransformation, ...]:
    """W ← (W - lr U)(1 - lr λ): the decay comes after the step. A first gradient moves nothing."""

    def share(count: Tensor) -> Hyper:
        return (lr(count) if callable(lr) else lr) * weight_decay - 1

    return (
        scale_by_learning_rate(share),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        _by_steps(lambda steps: (steps > 0).double(), "not_at_first"),
    )


def _corrected(betas: Sequence[float]) -> GradientTransformation:
    """U √(1 - β2^k) / (1 - β1^k), after k steps of the block's own in its bases."""
    beta1, beta2 = betas

    def factor(steps: Tensor) -> Tensor:
        k = steps.double().clamp(min=1)
        return (1 - beta2**k).sqrt() / (1 - beta1**k)

    return _by_steps(factor, "corrected")


def _by_steps(factor: Callable[[Tensor], Tensor], name: str) -> GradientTransformation:
    """U times a function of k, (N,): how many gradients a block has had since its first."""

    def scaled(updates: Tree, *, upstream: tuple[Any, ...] = ()) -> Tree:
        bases = find_state(upstream, EigenbasisState)
        assert bases is not None

        def leaf(u: Tensor, seen: Tensor) -> tuple[Tensor]:
            return (u * per_block(factor(seen - 1).to(u.dtype), u),)

        return update_leaves(leaf, updates, (), (bases.seen,))[0]

    return stateless(scaled, name)


def unit_rms() -> GradientTransformation:
    """U / (rms(U) + 1e-30) for every block."""
    return _by_rms(lambda rms: 1 / (rms + 1e-30), "unit_rms")


def bounded_rms(limit: float) -> GradientTransformation:
    """U min(1, limit / (rms(U) + 1e-7)) for every block."""
    return _by_rms(lambda rms: torch.clamp(limit / (rms + 1e-7), max=1.0), "bounded_rms")


def _by_rms(factor: Callable[[Tensor], Tensor], name: str) -> GradientTransformation:
    def scaled(updates: Tree, *, block_ndim: int = 0) -> Tree:
        def leaf(u: Tensor) -> tuple[Tensor]:
            axes = tuple(range(block_ndim, u.ndim))
            rms = u.square().mean(axes, keepdim=True).sqrt() if axes else u.abs()
            return (u * factor(rms),)

        return update_leaves(leaf, updates, ())[0]

    return stateless(scaled, name)


def _merged(limit: int) -> Callable[[tuple[int, ...]], Sequence[int]]:
    """Products of neighbours, from the first on, as long as they are at most `limit`."""

    def merge(shape: tuple[int, ...]) -> Sequence[int]:
        found: list[int] = []
        now = 1
        for d in shape:
            if now * d <= limit:
                now *= d
                continue
            if now > 1:
                found.append(now)
                now = d
            else:
                found.append(d)
                now = 1
        return [*found, now] if now > 1 or not found else found

    return merge
