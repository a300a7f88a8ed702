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


def test_an_adamw_in_groups_without_names_is_asked_for_them() -> None:
    """Decayed and undecayed, as in most trainers: equal shapes would take each other's moments."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    first, *rest = model.parameters()
    adamw = torch.optim.AdamW([{"params": rest}, {"params": [first], "weight_decay": 0.0}])
    model(torch.ones(3, 4)).square().sum().backward()
    adamw.step()
    saved = adamw.state_dict()
    optimizer = fs.for_model(model, "muon", lr=0.01)
    with pytest.raises(ValueError, match=r"groups have no names.*param_names"):
        optimizer.seed_from_adamw(saved)
    for group, names in zip(saved["param_groups"], (["1.weight", "2.weight"], ["0.weight"])):
        group["param_names"] = names
    optimizer.seed_from_adamw(saved)
    p = model[2].weight  # the head, which AdamW steps
    assert torch.equal(optimizer.state[p]["scale_by_adam/first"], adamw.state[p]["exp_avg"])
