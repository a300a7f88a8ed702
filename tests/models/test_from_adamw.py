"""`for_model` where torch's AdamW was before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funshampoo as fs


@pytest.mark.parametrize("accept_adamw", [False, True])
def test_a_checkpoint_of_adamws_in_one_group(accept_adamw: bool) -> None:
    """Its groups were asked for, which nobody who comes from AdamW has; the remedy has to work."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(3, 4)).square().sum().backward()
    adamw.step()
    optimizer = fs.for_model(model, "shampoo", lr=0.01, accept_adamw=accept_adamw)
    with pytest.raises(ValueError, match=r"groups of \[6\].* seed_from_adamw\(state_dict\)"):
        optimizer.load_state_dict(adamw.state_dict())
    optimizer.seed_from_adamw(adamw.state_dict())
    for p in (model[2].weight, model[2].bias, model[0].bias):
        moment = optimizer.state[p]["scale_by_adam/first"]
        assert torch.equal(moment, adamw.state[p]["exp_avg"])
