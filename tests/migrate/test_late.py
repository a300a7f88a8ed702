"""Gradients that are None at first: published optimizers count the steps of each parameter."""

from __future__ import annotations

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
