"""The SOAP-Muon record of modded-nanogpt, track 3, by its module's constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.hyperparams import inject_hyperparams
from funshampoo.combinators.masks import partition
from funshampoo.core.checks import check_count
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.tree import flatten
from funshampoo.recipes.routing import whole
from funshampoo.transforms import (
    AgreementGate,
    blend_towards,
    ema,
    ema_nesterov,
    hyperball,
    in_eigenbasis,
    kronecker_statistics,
    orthogonalize,
    radial_brake,
    scale_by_second_moment,
    update_floor,
)

ROLES = ("mlp", "qkv", "attn_proj", "plain")
RATE = 0.0375  # the record's


def soap_muon(
    *,
    lr: Hyper | Schedule = RATE,
    mu: Hyper = 0.95,
    target_uw: Hyper = 0.3825,
    soap_beta2: Hyper = 0.9,
    soap_frequency: int = 1,
    denom_power: float = 0.5,
    radial_outward_scale: Hyper = 0.5,
    radial_inward_scale: Hyper = 1.0,
    trust_floor: float = 0.45,
    trust_cap: float = 0.85,
    trust_floor_end_step: int = 1375,
    trust_floor_fade_end_step: int = 1625,
    trust_min_agree: float = 0.2,
    trust_min_grad_align: float = 0.0,
    trust_power: float = 1.0,
    roles: Any = "mlp",
    mu_schedule: Schedule | Sequence[float] | None = None,
) -> GradientTransformation:
    """SOAP-Muon: hidden matrices whitened, gated by role, orthogonalized.

    roles: "mlp" or "qkv" (whitened), "attn_proj" (as far as the gate lets it) or "plain" (Muon's),
    one for all parameters, a list in the order of the leaves, or a tree. mu_schedule: of the old
    step count, or a list, whose last entry stays; it takes the place of mu.
    """
    floor, cap = _trust(trust_floor, trust_cap, trust_floor_end_step, trust_floor_fade_end_step)
    gate = AgreementGate(trust_min_agree, trust_min_grad_align, trust_power, floor, cap)

    def by_role(mu: Hyper | Schedule) -> GradientTransformation:
        def stages(blend: Sequence[GradientTransformation]) -> GradientTransformation:
            direction = chain(
                kronecker_statistics(soap_beta2, bias_correction=False) if blend else chain(),
                ema(mu, nesterov=True, bias_correction=False),  # type: ignore[arg-type]
                *blend,
                orthogonalize("converging", 12, norm="schatten4", epsilon=0.0),
                radial_brake(radial_outward_scale, radial_inward_scale),
                update_floor(target_uw),
                hyperball(lr, relative=False, radius="first_order"),
            )
            return whole(direction, 20, None)

        second = scale_by_second_moment(
            soap_beta2, 1e-16, exponent=denom_power, damping="floor", bias_correction=False
        )
        whitened = in_eigenbasis(second, soap_frequency, offset=1)
        all_of_it, some = [blend_towards(whitened)], [blend_towards(whitened, gate)]
        blends = {"mlp": all_of_it, "qkv": all_of_it, "attn_proj": some, "plain": []}
        return partition({role: stages(blend) for role, blend in blends.items()}, _labels(roles))

    if mu_schedule is None:
        return by_role(mu)
    schedule = mu_schedule if callable(mu_schedule) else _listed(mu_schedule)
    return inject_hyperparams(by_role)(schedule)


def with_ema_nesterov(
    *,
    lr: Hyper | Schedule = RATE,
    initial_lr: float = RATE,
    lookahead: Mapping[str, Any] | None = None,
    **args: Any,
) -> GradientTransformation:
    """SOAP-Muon whose gradients are taken ahead of the weights, along the average of their steps.

    lookahead has lookahead_stepsize, use_scheduled_lookahead_stepsize, lookahead_ema,
    prefill_steps and rest_steps, of which the last two bound the calls that look ahead, from 0.
    initial_lr is ours, for a schedule as lr: what the scheduled step size divides its rates by.
    """
    known = {
        "lookahead_stepsize": 0.3,
        "use_scheduled_lookahead_stepsize": True,
        "lookahead_ema": 0.9,
        "prefill_steps": 0,
        "rest_steps": None,
    }
    unknown = sorted((lookahead or {}).keys() - known.keys())
    if unknown:
        raise TypeError(f"lookahead has no field {unknown[0]!r}; it has {', '.join(known)}.")
    given: dict[str, Any] = {**known, **(lookahead or {})}
    size, last = given["lookahead_stepsize"], given["rest_steps"]
    scheduled = given["use_scheduled_lookahead_stepsize"] and callable(lr)

    def ahead(count: Tensor) -> Tensor:
        here = count >= given["prefill_steps"]
        if last is not None:
            here = here & (count < last)
        # the schedule is set after the look-ahead, so that this knows the rate before
        rate = lr(count - 1) / initial_lr if scheduled else 1.0  # type: ignore[operator]
        return torch.where(here, torch.as_tensor(size * rate, dtype=torch.float64), 0.0)

    return chain(soap_muon(lr=lr, **args), ema_nesterov(ahead, given["lookahead_ema"]))


def _trust(floor: float, cap: float, floor_end: int, fade_end: int) -> tuple[Schedule, Schedule]:
    """The least and the most of the gate: let go of between two steps, both counted from 0."""
    check_count("trust_floor_end_step", floor_end, 0)
    check_count("trust_floor_fade_end_step", fade_end, floor_end)

    def least(count: Tensor) -> Tensor:
        faded = (count.double() - floor_end) / max(fade_end - floor_end, 1)
        return floor * (1 - faded.clamp(0, 1)) * (count < fade_end)

    def most(count: Tensor) -> Tensor:
        return torch.where(count < fade_end, torch.as_tensor(cap, dtype=torch.float64), 1.0)

    return least, most


def _listed(values: Sequence[float]) -> Schedule:
    table = torch.tensor(values, dtype=torch.float64)

    def at(count: Tensor) -> Tensor:
        value: Tensor = table[count.clamp(max=len(values) - 1)]
        return value

    return at


def _labels(roles: Any) -> Any:
    """`roles` for `partition`: a list of them goes with the leaves in their order."""
    if not isinstance(roles, (list, tuple)):
        return roles

    def labels(tree: Tree) -> Tree:
        leaves, spec = flatten(tree)
        if len(leaves) != len(roles):
            raise ValueError(f"roles has {len(roles)} entries for {len(leaves)} parameters.")
        return spec.unflatten(roles)

    return labels


METHODS: dict[str, Callable[..., GradientTransformation]] = {
    "SOAP-Muon": soap_muon,
    "SOAP-Muon + EMA-Nesterov": with_ema_nesterov,
}
