"""The SOAP-Muon record of modded-nanogpt, track 3, from its module's constants."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.combinators.hyperparams import inject_hyperparams
from funshampoo.combinators.masks import partition
from funshampoo.core.checks import check_choice, check_count, check_flag, check_range, hint
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree, renamed
from funshampoo.core.live import Derived, Live, initial
from funshampoo.core.modes import constant
from funshampoo.core.text import plural
from funshampoo.core.tree import flatten, labels_of
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
    lookahead: Mapping[str, Any] | None = None,
    initial_lr: Hyper | None = None,
) -> GradientTransformation:
    """SOAP-Muon: hidden matrices whitened, gated by role, orthogonalized.

    roles: "mlp" or "qkv" (whitened), "attn_proj" (whitened as far as the gate allows) or "plain"
    (Muon's): one for all parameters, a list in the order of the leaves, or a tree. mu_schedule: of
    the old step count, or a list whose last entry stays; it replaces mu. lookahead: EMA-Nesterov's,
    see `_looking_ahead`. initial_lr is ours: a scheduled look-ahead divides lr by it, the record by
    its group's; by default it is the record's for a schedule, and lr itself for a number.
    """
    floor, cap = trust(trust_floor, trust_cap, trust_floor_end_step, trust_floor_fade_end_step)
    gate = AgreementGate(trust_min_agree, trust_min_grad_align, trust_power, floor, cap)
    second = scale_by_second_moment(
        soap_beta2, 1e-16, exponent=denom_power, damping="floor", bias_correction=False
    )
    whitened = in_eigenbasis(second, soap_frequency, offset=1)

    def stages(mu: Hyper, *blend: GradientTransformation) -> GradientTransformation:
        statistics = [kronecker_statistics(soap_beta2, bias_correction=False)] if blend else []
        direction = chain(
            *statistics,
            ema(mu, nesterov=True, bias_correction=False),
            *blend,
            orthogonalize("converging", 12, norm="schatten4", epsilon=0.0),
            radial_brake(radial_outward_scale, radial_inward_scale),
            update_floor(target_uw),
            hyperball(lr, relative=False, radius="first_order"),
        )
        return whole(direction, 20, None)

    def by_role(mu: Hyper | Schedule) -> GradientTransformation:
        now: Any = mu  # a schedule's value, if it is one
        of_role = {
            "mlp": stages(now, blend_towards(whitened)),
            "attn_proj": stages(now, blend_towards(whitened, gate)),
            "plain": stages(now),
        }
        return partition(of_role, _labels(roles))

    if initial_lr is not None:
        check_range("initial_lr", initial_lr, 0.0)
    given = mu_schedule is None or callable(mu_schedule)
    momentum: Any = mu_schedule if given else _listed(mu_schedule)  # type: ignore[arg-type]
    tx = by_role(mu) if momentum is None else inject_hyperparams(by_role)(momentum)
    if lookahead is not None:
        return chain(tx, _looking_ahead(lr, initial_lr, lookahead))
    return renamed(tx, "soap_muon")  # only mu is injected, so the wrapper may rebuild it


def _looking_ahead(
    lr: Hyper | Schedule, initial_lr: Hyper | None, lookahead: Mapping[str, Any]
) -> GradientTransformation:
    """Gradients ahead of the weights, in calls prefill_steps to rest_steps - 1, counted from 0."""
    known = {
        "lookahead_stepsize": 0.3,
        "use_scheduled_lookahead_stepsize": True,
        "lookahead_ema": 0.9,
        "prefill_steps": 0,
        "rest_steps": None,
    }
    if not isinstance(lookahead, Mapping):
        raise TypeError(f"lookahead is {lookahead!r}; give a dict of {', '.join(known)}.")
    unknown = sorted(lookahead.keys() - known.keys())
    if unknown:
        near = hint(unknown[0], known)
        raise TypeError(f"lookahead has no field {unknown[0]!r}; it has {', '.join(known)}{near}")
    is_live = isinstance(lr, Live)
    first = (initial(lr) if is_live else RATE) if initial_lr is None else initial_lr
    check_range("initial_lr", first, 0.0, low_open=True)
    given: dict[str, Any] = {**known, **lookahead}
    check_range("lookahead_stepsize", given["lookahead_stepsize"], 0.0)
    size, last = given["lookahead_stepsize"], given["rest_steps"]
    check_flag("use_scheduled_lookahead_stepsize", given["use_scheduled_lookahead_stepsize"])
    check_count("prefill_steps", given["prefill_steps"], 0)
    if last is not None:
        check_count("rest_steps", last, 0)
    follows = callable(lr) or is_live or initial_lr is not None
    scheduled = given["use_scheduled_lookahead_stepsize"] and follows
    rate = (lambda count: lr(count - 1)) if callable(lr) else lr  # it is set after the look-ahead

    def ahead(count: Tensor, rate: Any, first: Any) -> Tensor:
        here = count >= given["prefill_steps"]
        if last is not None:
            here = here & (count < last)
        now = size * rate / first if scheduled else size
        share: Tensor = here.double() * now  # as a product, which needs no copy from the host
        return share

    return ema_nesterov(Derived(ahead, (rate, first)), given["lookahead_ema"])


def trust(floor: float, cap: float, floor_end: int, fade_end: int) -> tuple[Schedule, Schedule]:
    """The gate's floor and cap, faded out between two steps, both counted from 0."""
    check_range("trust_floor", floor, 0.0, 1.0)
    check_range("trust_cap", cap, 0.0, 1.0)
    check_count("trust_floor_end_step", floor_end, 0)
    check_count("trust_floor_fade_end_step", fade_end, floor_end)

    def least(count: Tensor) -> Tensor:
        faded = (count.double() - floor_end) / max(fade_end - floor_end, 1)
        return floor * (1 - faded.clamp(0, 1)) * (count < fade_end)

    def most(count: Tensor) -> Tensor:
        inside = (count < fade_end).double()
        return inside * cap + (1 - inside)

    return least, most


def _listed(values: Sequence[float]) -> Schedule:
    if len(values) == 0:
        raise ValueError("mu_schedule is empty; leave it out, and mu is the momentum of all steps.")
    for value in values:
        check_range("mu_schedule", value, 0.0, 1.0, high_open=True)
    numbers = [float(value) for value in values]

    @functools.partial(constant, most=4)
    def table(device: torch.device) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    def at(count: Tensor) -> Tensor:
        place = count.clamp(max=len(values) - 1).reshape(1)
        # on the clock's device; a plain index would make a graph read the count
        return table(count.device).gather(0, place)[0]

    return at


def _labels(roles: Any) -> Any:
    """`roles` for `partition`: a list is matched with the leaves in order."""
    alike = {"qkv": "mlp"}  # its gate is 1

    def labels(tree: Tree) -> Tree:
        leaves, spec = flatten(tree)
        given = roles if isinstance(roles, (list, tuple)) else labels_of(roles, tree, "roles")
        if len(leaves) != len(given):
            raise ValueError(
                f"roles has {plural(len(given), 'entry', 'entries')} for "
                f"{plural(len(leaves), 'parameter')}."
            )
        for role in given:
            check_choice("roles", role, ROLES)
        return spec.unflatten([alike.get(role, role) for role in given])

    return labels
