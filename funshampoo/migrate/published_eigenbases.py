"""Published SOAP, KL-Shampoo, KL-SOAP and SPlus, from their constructors' arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.masks import partition
from funshampoo.core.checks import check_count, check_range, chosen
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, State, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Derived, Numbers, number
from funshampoo.core.tree import map_leaves, update_leaves
from funshampoo.linalg import orthogonal_iteration
from funshampoo.migrate.published_muon import on_matrices
from funshampoo.operators.kl import clamped_at
from funshampoo.operators.leaf_ops import per_block
from funshampoo.operators.leafwise import leafwise
from funshampoo.recipes.routing import whole
from funshampoo.recipes.splus import signs_in_eigenbases
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.nodes import find_state
from funshampoo.transforms import (
    add_decayed_weights,
    ema,
    hyperball,
    in_eigenbasis,
    kl_statistics,
    kronecker_statistics,
    scale_by_eigenvalues,
    scale_by_learning_rate,
    scale_by_rms,
)


def soap(
    *,
    lr: Hyper | Schedule = 3e-3,
    betas: tuple[Hyper, Hyper] = (0.95, 0.95),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: Hyper = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
) -> GradientTransformation:
    """SOAP of nikhilvyas/SOAP: a block is a whole parameter, and large sides are left alone.

    `data_format` sets the order in which `merge_dims` walks a kernel's sides; unused without it.
    """
    formats = {"channels_first": False, "channels_last": merge_dims}
    permutes = chosen("data_format", data_format, formats)
    beta1, beta2 = betas
    check_range("max_precond_dim", max_precond_dim, 0, infinite=True)

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


_CHANNELS_SECOND = (0, 3, 1, 2)
_CHANNELS_LAST = (0, 2, 3, 1)


def channels_second(inner: GradientTransformation) -> GradientTransformation:
    """Apply `inner` to kernels (out, height, width, in) as (out, in, height, width).

    Other leaves stay as they are. Which sides a `merge` of `blocked` joins depends on their order.
    The state is `inner`'s, with blocks of the permuted kernel: `to_parameters` needs its shape.

    Args:
        inner: a transformation that depends on nothing around it except what goes with the leaves,
            such as `blocked`.
    """

    def init(params: Tree, **context: Any) -> State:
        return inner.init(_permuted(params, _CHANNELS_SECOND), **context)

    def update(updates: Tree, state: State, params: Tree, context: Context) -> tuple[Tree, State]:
        seen = None if params is None else _permuted(params, _CHANNELS_SECOND)
        found, state = inner.run(_permuted(updates, _CHANNELS_SECOND), state, seen, context)
        return _permuted(found, _CHANNELS_LAST), state

    return GradientTransformation(
        init, update, parts={"inner": inner}, state_of=lambda state, name: state
    )


def _permuted(tree: Tree, order: tuple[int, ...]) -> Tree:
    """Leaves with four sides, permuted to this order; all others, and None, as they are."""
    return map_leaves(lambda x: x if x is None or x.ndim != 4 else x.permute(order), tree)


def decayed_steps(lr: Hyper | Schedule, weight_decay: Hyper) -> tuple[GradientTransformation, ...]:
    """W ← (W - lr U)(1 - lr λ): decay comes after the step. The first gradient moves nothing."""

    def share(count: Tensor, lr: Any, weight_decay: Any) -> Any:
        return 1 - lr * weight_decay

    return (
        scale_by_learning_rate(Derived(share, (lr, weight_decay)), flip_sign=False),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
        _by_steps("not_at_first", lambda steps: (steps > 0).double()),
    )


def _corrected(betas: Sequence[Hyper]) -> GradientTransformation:
    """U √(1 - β2^k) / (1 - β1^k), after k steps of the block itself in its bases."""

    def factor(steps: Tensor, beta1: Any, beta2: Any) -> Tensor:
        k = steps.double().clamp(min=1)
        corrected: Tensor = (1 - beta2**k).sqrt() / (1 - beta1**k)
        return corrected

    return _by_steps("corrected", factor, *betas)


def _by_steps(name: str, factor: Callable[..., Tensor], *numbers: Hyper) -> GradientTransformation:
    """U times a function of k, (N,): how many gradients a block has had since its first."""

    def scaled(
        updates: Tree, *, upstream: tuple[Any, ...] = (), hyper: Numbers = NO_NUMBERS
    ) -> Tree:
        now = [number(x, hyper) for x in numbers]
        bases = find_state(upstream, EigenbasisState)
        assert bases is not None

        def leaf(u: Tensor, seen: Tensor) -> tuple[Tensor]:
            return (u * per_block(factor(seen - 1, *now).to(u.dtype), u),)

        return update_leaves(leaf, updates, (), (bases.seen,))[0]

    return stateless(scaled, name, numbers=numbers)


def unit_rms() -> GradientTransformation:
    """U / (rms(U) + 1e-30) for every block."""
    return _by_rms(lambda rms: 1 / (rms + 1e-30), "unit_rms")


def bounded_rms(limit: float) -> GradientTransformation:
    """U min(1, limit / (rms(U) + 1e-7)) for every block."""
    return _by_rms(lambda rms: torch.clamp(limit / (rms + 1e-7), max=1.0), "bounded_rms")


def _by_rms(factor: Callable[[Tensor], Tensor], name: str) -> GradientTransformation:
    def scaled(u: Tensor, block_ndim: int) -> Tensor:
        axes = tuple(range(block_ndim, u.ndim))
        rms = u.square().mean(axes, keepdim=True).sqrt() if axes else u.abs()
        return u * factor(rms)

    return leafwise(scaled, name=name)


def _merged(limit: int) -> Callable[[tuple[int, ...]], Sequence[int]]:
    """Products of neighbouring sides, from the first on, as long as they are at most `limit`."""

    def merge(shape: tuple[int, ...]) -> Sequence[int]:
        found: list[int] = []
        now = 1
        for d in shape:
            if now * d <= limit:
                now *= d
            elif now > 1:
                found.append(now)
                now = d
            else:
                found.append(d)
        return [*found, now] if now > 1 or not found else found

    return merge


def kl_methods(
    *,
    lr: Hyper | Schedule = 1e-4,
    betas: tuple[Hyper, Hyper] = (0.9, 0.98),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: Hyper = 0.01,
    precondition_frequency: int = 10,
    using_klsoap: bool = False,
    normalize_grads: bool = False,
    init_factor: float = 0.1,
    using_damping: bool = False,
    using_clamping: bool = True,
    max_clamp_value: int = 4000,
    cast_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """KLOpt of yorkerlin/KL-Methods.

    Sides of 1 are dropped, as there; vectors and tensors of order 4 or more, on which it fails, are
    ordinary blocks here. cast_dtype, bfloat16 by default there, is the dtype of gradients, moments,
    statistics and bases, each rounded at every step by kernels that torch.compile generates: no
    other implementation can reproduce those numbers. None here is float32 or wider.
    """
    if cast_dtype not in (None, torch.float32, torch.float64):
        raise NotImplementedError(
            f"cast_dtype {cast_dtype}: what is kept is in float32 at least here, since an average "
            "in half precision loses gradients that are small beside it; leave it out."
        )
    check_count("max_clamp_value", max_clamp_value)
    beta1, beta2 = betas
    ratio = scale_by_rms(beta2, eps) if using_klsoap else scale_by_eigenvalues(eps)
    statistics = kl_statistics(
        beta2 if shampoo_beta < 0 else shampoo_beta,
        initial_eigenvalue=init_factor,
        least_eigenvalue=clamped_at(max_clamp_value) if using_clamping else 0.0,
        damping=eps if using_damping else 0.0,
        in_turn=True,
    )
    turned = _turned(beta1, ratio, precondition_frequency)
    normalized = [unit_rms()] if normalize_grads else []
    inner = chain(statistics, turned, *normalized, *decayed_steps(lr, weight_decay))
    return whole(inner, 20, None, merge=_squeezed)


def klsoap_h(
    *,
    lr: Hyper | Schedule = 0.018,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.9,
    shampoo_beta: float = 0.9,
    eps: float = 1e-8,
    precondition_frequency: int = 1,
) -> GradientTransformation:
    """KLSOAPH of modded-nanogpt's track 3: KL-SOAP with steps on the sphere, without decay."""
    statistics = kl_statistics(
        shampoo_beta, least_eigenvalue=1 / 4000**2, bias_correction=False, starts_whole=True
    )
    turned = _turned(beta1, scale_by_rms(beta2, eps), precondition_frequency)
    return on_matrices(statistics, turned, hyperball(lr))


def _turned(beta1: Hyper, ratio: GradientTransformation, every: int) -> GradientTransformation:
    momentum = ema(beta1, bias_correction=False)
    return in_eigenbasis(chain(momentum, ratio), every, offset=1, basis=orthogonal_iteration())


def _squeezed(shape: tuple[int, ...]) -> Sequence[int]:
    return [d for d in shape if d != 1]


def splus(
    *,
    lr: Hyper | Schedule = 0.1,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    ema_rate: Hyper = 0.999,
    inverse_every: int = 100,
    eps: float = 1e-30,
    weight_decay: Hyper = 0.01,
    max_dim: int = 10_000,
    nonstandard_constant: float = 0.001,
) -> GradientTransformation:
    """SPlus of kvfrans/splus. eps, added to the factor matrices, changes no eigenvector.

    A side of exactly max_dim is left alone there, by mistake, at a matrix's rate; `recipes.splus`
    preconditions it.
    """
    check_range("max_dim", max_dim, 0, infinite=True)
    check_range("eps", eps, 0.0)
    check_range("nonstandard_constant", nonstandard_constant, 0)

    stages = signs_in_eigenbases(
        lr,
        beta1=b1,
        beta2=b2,
        average=ema_rate,
        weight_decay=weight_decay,
        every=inverse_every,
        basis=None,
        is_kept=lambda d: d < max_dim,
        max_side=max_dim,
        others_scale=nonstandard_constant,
    )
    return whole(chain(*stages), 20, None)
