"""Messages and reports count as people do."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.plan.planner import plan
from funshampoo.state import health


def message_of(act: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, fs.FailureLimitError)) as found:
        act()
    return str(found.value)


def of_one_step() -> Any:
    """Of one parameter whose gradient is inf: what health prints, and the error after one step."""
    tx, w = fs.shampoo(0.1, every=1, max_failures=1), {"w": torch.ones(2, 2)}
    bad = {"w": torch.full((2, 2), torch.inf)}
    state = tx.update(bad, tx.init(w), w)[1]
    return str(health(state, file=io.StringIO())), message_of(lambda: tx.update(bad, state, w))


def of_one_parameter() -> Any:
    w = [torch.nn.Parameter(torch.ones(2, 2))]
    adamw = torch.optim.AdamW(w).state_dict()
    saved = fs.adamw(0.1).init({"w": w[0].detach()})
    named = {"params": w, "param_names": ["a"]}
    optimizer = fs.Optimizer([named], fs.adamw, lr=0.1)
    optimizer.param_groups[0]["param_names"] = ["a", "b"]
    return (
        message_of(lambda: fs.state.seed_from_adamw(saved, adamw, ["a", "b"])),
        message_of(optimizer.state_dict),
        str(plan({"w": (2, 2)}, 1)),
        str(fs.routing_table(fs.Optimizer(w, fs.adamw, lr=0.1))),
    )


@pytest.mark.parametrize("make", [of_one_step, of_one_parameter])
def test_one_is_no_plural(make: Callable[[], Any]) -> None:
    texts = make()
    assert all(re.search(r"\b1 [a-z]", text) for text in texts)
    assert not [found for text in texts for found in re.findall(r"\b1 [a-z-]+[^s\W]s\b", text)]
