"""Gradients that are None at first: whose steps count, a parameter's own or everyone's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs

BY_PARAMETER = {
    "KL-SOAP": {"precondition_frequency": 1, "weight_decay": 0.5},
    "KL-SOAP (Emerging-Optimizers)": {"eps": 0.1, "weight_decay": 0.5},
    "KL-SOAP-H (hyperball)": {},
    "KL-Shampoo": {"precondition_frequency": 1, "weight_decay": 0.5},
    "Muon": {"weight_decay": 0.5},
    "NorMuon": {"weight_decay": 0.5},
    "REKLS": {"eps": 0.1, "weight_decay": 0.5},
    "SOAP": {"precondition_frequency": 1, "weight_decay": 0.5},
    "SOAP (Emerging-Optimizers)": {"eps": 0.1, "weight_decay": 0.5},
    "SOAP-Muon": {},
    "SPlus": {"inverse_every": 1, "weight_decay": 0.5},
}
LATE = 4


@pytest.mark.parametrize("method", BY_PARAMETER)
def test_a_parameter_that_comes_late_has_the_steps_that_it_has_alone(method: str) -> None:
    tx = fs.from_published(method, lr=0.01, **BY_PARAMETER[method])
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4, 4, dtype=torch.float64, generator=generator)  # noqa: E731
    params = {"early": draw(), "late": draw()}
    alone = {"late": params["late"]}
    state, own = tx.init(params), tx.init(alone)
    for step in range(10):
        grads = {"early": draw(), "late": draw()}
        if step >= LATE:
            updates, own = tx.update({"late": grads["late"]}, own, alone)
            alone = fs.apply_updates(alone, updates)
        here = grads if step >= LATE else {**grads, "late": None}
        updates, state = tx.update(here, state, params)
        params = fs.apply_updates(params, updates)
        torch.testing.assert_close(params["late"], alone["late"], rtol=0, atol=1e-12)


def _reference(kind: str, **more: Any) -> fs.GradientTransformation:
    averaging = {"iterate_averaging_config": {"type": f"{kind}Config"}} if kind else {}
    return fs.from_reference(lr=0.125, betas=(0.9, 0.99), epsilon=1e-8, **averaging, **more)


RISING = lambda count: 0.01 * (count + 1)  # noqa: E731 (one rate for all would hide the weights)

BY_EVERYONE = {
    "AdamW": lambda: fs.from_published("AdamWScheduleFree", lr=RISING, inner_momentum=0.9, r=1.0),
    "SGD": lambda: fs.from_published("SGDScheduleFree", lr=0.1, warmup_steps=6),
    "RAdam": lambda: fs.from_published("RAdamScheduleFree", lr=0.1, betas=(0.9, 0.9)),
    "reference, Schedule-Free": lambda: _reference("ScheduleFree"),
    "reference, as in the paper": lambda: _reference("ScheduleFree", as_published=False),
    "reference, momentum": lambda: _reference(
        "ClassicMomentum", grafting_config={"type": "AdamPreconditionerConfig"}
    ),
    "reference, corrected": lambda: _reference(
        "",
        preconditioner_config={"type": "EigenvalueCorrectedShampooPreconditionerConfig"},
    ),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", BY_EVERYONE)
def test_where_everyones_steps_count_no_gradient_yet_is_one_of_zeros(
    name: str, in_place: bool
) -> None:
    """Every average starts at zero, and nothing has moved: only the counts could tell."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4, 4, dtype=torch.float64, generator=generator)  # noqa: E731
    first, steps = (
        {"early": draw(), "late": draw()},
        [{"early": draw(), "late": draw()} for _ in range(12)],
    )
    ends = []
    for absent in (None, torch.zeros(4, 4, dtype=torch.float64)):
        tx, params = BY_EVERYONE[name](), {k: x.clone() for k, x in first.items()}
        state = tx.init(params)
        for step, grads in enumerate(steps):
            here = grads if step >= LATE else {**grads, "late": absent}
            if in_place:
                state = fs.update_in_place(tx, here, state, params)
                continue
            updates, state = tx.update(here, state, params)
            params = fs.apply_updates(params, updates)
        ends.append(params)
    assert not torch.allclose(ends[0]["late"], first["late"], atol=1e-3)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
