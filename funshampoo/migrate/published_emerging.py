"""SOAP, REKLS and KL-SOAP of NVIDIA-NeMo/Emerging-Optimizers, from their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.checks import check_range
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, stateless
from funshampoo.core.live import NO_NUMBERS, Numbers, is_exactly, number
from funshampoo.core.tree import update_leaves
from funshampoo.linalg import by_rank, orthogonal_iteration
from funshampoo.migrate.published_eigenbases import bounded_rms
from funshampoo.migrate.published_muon import decayed, on_matrices
from funshampoo.operators.leaf_ops import per_block
from funshampoo.operators.matrices import safe
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import EmaState
from funshampoo.transforms import (
    ema,
    in_eigenbasis,
    kl_statistics,
    kronecker_statistics,
    scale_by_adam,
    scale_by_rms,
)


def soap(
    *,
    lr: Hyper | Schedule = 3e-4,
    betas: tuple[Hyper, Hyper] = (0.9, 0.95),
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: Hyper = 0.01,
    weight_decay_method: str = "decoupled",
    nesterov: bool = False,
    correct_bias: bool = True,
    fp32_matmul_prec: str = "highest",
    use_eigh: bool = False,
    qr_fp32_matmul_prec: str = "high",
    power_iter_steps: int = 1,
    max_update_rms: float = 0.0,
    use_kl_shampoo: bool = False,
    correct_shampoo_beta_bias: bool | None = None,
    stream_list: Any = None,
) -> GradientTransformation:
    """Class SOAP: bases are refreshed before every step, columns sorted, second moments are not.

    fp32_matmul_prec, qr_fp32_matmul_prec and stream_list have no effect here. lr has no default
    there.
    """
    check_range("max_update_rms", max_update_rms, 0.0, infinite=True)
    check_range("eps", eps, 0.0, low_open=use_kl_shampoo)
    corrects = correct_bias if correct_shampoo_beta_bias is None else correct_shampoo_beta_bias
    statistics = (
        kl_statistics(shampoo_beta, through="ritz", least_eigenvalue=eps, bias_correction=corrects)
        if use_kl_shampoo
        # An average of only the last gradient has no bias.
        else kronecker_statistics(
            shampoo_beta, bias_correction=corrects and not is_exactly(shampoo_beta, 0.0)
        )
    )
    turned = in_eigenbasis(
        _adam(betas, eps, correct_bias, nesterov),
        1,
        basis=by_rank() if use_eigh else orthogonal_iteration(sort=True, steps=power_iter_steps),
        first="identity",
        renew_before_use=True,
    )
    clipped = [bounded_rms(max_update_rms)] if max_update_rms else []
    before, after = decayed(weight_decay_method, weight_decay, lr)
    direction = _of_updates(turned) if before else turned
    return on_matrices(statistics, *before, direction, *clipped, *after)


def _subset(names: Sequence[str], **fixed: Any) -> Callable[..., GradientTransformation]:
    """A class whose constructor takes these arguments of `soap`, and fixes the others."""

    def built(**given: Any) -> GradientTransformation:
        return soap(**given, **fixed)

    known = inspect.signature(soap)
    own = known.replace(parameters=[known.parameters[name] for name in names])
    built.__signature__ = own  # type: ignore[attr-defined]
    return built


_COMMON = ("lr", "betas", "shampoo_beta", "eps", "weight_decay")

# Class REKLS: SOAP with KL-Shampoo's statistics and a decomposition on every step.
rekls = _subset((*_COMMON, "weight_decay_method"), use_eigh=True, use_kl_shampoo=True)

# Class KlSoapV3: SOAP with KL-Shampoo's statistics.
kl_soap = _subset((*_COMMON, "stream_list"), use_kl_shampoo=True)


def _adam(
    betas: tuple[Hyper, Hyper], eps: float, corrects: bool, nesterov: bool
) -> GradientTransformation:
    beta1, beta2 = betas
    if not corrects:
        filtered = ema(beta1, nesterov=nesterov, bias_correction=False)
        return chain(filtered, scale_by_rms(beta2, eps))
    # Without a first moment there is no look-ahead.
    ahead = [_look_ahead(beta1)] if nesterov and not is_exactly(beta1, 0.0) else []
    return chain(ema(beta1), *ahead, scale_by_adam(0.0, beta2, eps))


def _look_ahead(beta1: Hyper) -> GradientTransformation:
    """beta1 M / (1 - beta1^(t+1)) + (1 - beta1) G / (1 - beta1^t), as in the source.

    `ema(nesterov=True)` divides both by 1 - beta1^(t+1), their total weight.
    """

    def looked(
        updates: Tree,
        *,
        gradient: Tree = None,
        upstream: tuple[Any, ...] = (),
        hyper: Numbers = NO_NUMBERS,
    ) -> Tree:
        state = find_state(upstream, EmaState)
        assert state is not None
        beta: Any = number(beta1, hyper)

        def leaf(u: Tensor, g: Tensor, m: Tensor, weight: Tensor) -> tuple[Tensor]:
            ahead = per_block(beta * weight + (1 - beta), m)
            return (beta * m / ahead + (1 - beta) * g / safe(per_block(weight, m)),)

        inputs = (gradient, state.average, state.weight)
        return update_leaves(leaf, updates, (), inputs)[0]

    return stateless(looked, "look_ahead", numbers=[beta1])


def _of_updates(inner: GradientTransformation) -> GradientTransformation:
    """Make the incoming updates the `gradient` inside, since decay has been added to them."""

    def update(run: Any, updates: Tree, own: Any) -> tuple[Tree, Any]:
        return run(updates, gradient=updates), own

    return wrapping(inner, update, name="of_updates")
