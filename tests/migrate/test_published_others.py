"""Arguments of the Muons, SPlus, Schedule-Free and SOAP-Muon that no published trajectory shows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.migrate.published import METHODS
from tests.migrate import plain_others

STEPS = 9
MATRICES = [(6, 9), (9, 4), (5, 5), (1, 7)]
NEARLY_SQUARE = [(7, 8), (9, 8), (6, 6)]  # a first gradient leaves no null space of two dimensions
ANY = [(6, 9), (5,), (), (4, 3, 2), (4, 3, 3, 3)]
MODELS: dict[str, tuple[Any, list[tuple[int, ...]], list[dict[str, Any]]]] = {
    "Muon": (
        plain_others.muon,
        [*MATRICES, (2, 6, 9), (4, 3, 3, 2), (2, 2, 3, 4, 2)],
        [{"momentum": 0.0}, {"nesterov": False}, {"ns_steps": 3}, {"weight_decay": 0.3}],
    ),
    "Muon (torch.optim)": (
        plain_others.muon_torch,
        MATRICES,
        [
            {"nesterov": False, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
            {"eps": 10.0, "adjust_lr_fn": "match_rms_adamw"},
        ],
    ),
    "Muon (Emerging-Optimizers)": (
        plain_others.muon_nvidia,
        MATRICES,
        [
            *[
                {"coefficient_type": name, "num_ns_steps": n, "nesterov": n == 3}
                for name in plain_others.NVIDIA
                for n in (3, 10)
            ],
            {"scale_mode": "unit_rms_norm", "weight_decay_method": "l2", "weight_decay": 0.3},
            {"scale_mode": "shape_scaling", "weight_decay_method": "independent"},
            {"extra_scale_factor": 0.2, "momentum": 0.5},
        ],
    ),
    "NorMuon": (
        plain_others.normuon,
        [*MATRICES, (2, 6, 9), (4, 3, 3, 2)],
        [
            {"flatten": True, "adjust_lr": "rms_norm"},
            {"adjust_lr": None, "nesterov": True, "cautious_wd": True, "weight_decay": 0.3},
            {"use_polar_express": False, "epsilon": 1e-2, "mu": 0.5, "muon_beta2": 0.5},
        ],
    ),
    "SPlus": (
        plain_others.splus,
        [*NEARLY_SQUARE, *ANY[1:]],
        [
            {"inverse_every": 2, "b2": 0.9, "ema_rate": 0.5, "weight_decay": 0.3},
            {"max_dim": 8, "inverse_every": 1, "b1": 0.0},
            {"max_dim": 1, "nonstandard_constant": 0.1},
        ],
    ),
    "AdamWScheduleFree": (
        plain_others.schedule_free,
        ANY,
        [
            {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
            {"warmup_steps": 20, "r": 1.0, "weight_lr_power": 1.0},
            {"inner_momentum": 0.5, "warmup_steps": 3, "weight_lr_power": 0.0},
        ],
    ),
    "SGDScheduleFree": (
        plain_others.schedule_free,
        ANY,
        [{"momentum": 0.5, "weight_decay": 0.3}, {"warmup_steps": 4, "r": 0.5}, {"momentum": 1.0}],
    ),
    "RAdamScheduleFree": (
        plain_others.schedule_free,
        ANY,
        [
            {"silent_sgd_phase": False, "betas": (0.9, 0.95), "r": 1.0},
            {"betas": (0.95, 0.7), "weight_decay": 0.3},  # never rectified
        ],
    ),
    "SOAP-Muon": (
        plain_others.soap_muon,
        NEARLY_SQUARE,
        [
            {"roles": "qkv", "soap_frequency": 2, "denom_power": 0.25},
            {"roles": "plain", "target_uw": 1.5, "mu": 0.5},
            {"roles": "attn_proj", "trust_floor": 0.0, "trust_cap": 1.0, "trust_min_agree": -0.5},
            {
                "roles": "attn_proj",
                "trust_floor_end_step": 2,
                "trust_floor_fade_end_step": 6,
                "trust_power": 2.0,
                "trust_min_grad_align": 0.1,
            },
            {"radial_outward_scale": 2.0, "radial_inward_scale": 0.0, "target_uw": 0.0},
        ],
    ),
}
CASES = [(method, args) for method in MODELS for args in ({}, *MODELS[method][2])]


@pytest.mark.parametrize(("method", "changes"), CASES, ids=str)
def test_agrees_with_the_plain_model(method: str, changes: dict[str, Any]) -> None:
    """At a rate that falls from call to call; parameters and averages, in float64."""
    model, shapes, _ = MODELS[method]
    known = inspect.signature(METHODS[method]).parameters
    args = {**{name: p.default for name, p in known.items()}, **changes}
    rates = [0.05 * (1 - t / 20) for t in range(STEPS)]
    args["lr"] = lambda count: 0.05 * (1 - count.double() / 20)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    starts = [draw(*shape) for shape in shapes]
    grads = [list(draw(*shape) + draw(STEPS, *shape)) for shape in shapes]
    wanted = [model(w, g, rates, args) for w, g in zip(starts, grads)]
    tx, params = fs.from_published(method, **args), starts
    state = tx.init(params)
    for t in range(STEPS):
        updates, state = tx.update([g[t] for g in grads], state, params)
        params = fs.apply_updates(params, updates)
        averages = fs.evaluation_parameters(state, params) if wanted[0][1] else []
        pairs = [(p, w[0][t]) for p, w in zip(params, wanted)]
        pairs += [(x, w[1][t]) for x, w in zip(averages, wanted)]
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
