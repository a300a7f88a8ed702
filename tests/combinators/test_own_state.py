"""The state of a combinator of a user's belongs to the parameters, as a stage's does."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import funshampoo as fs
from funshampoo.authoring import map_leaves, update_leaves, wrapping
from funshampoo.state import load_state_dict, state_dict
from tests.trees import assert_equal


class Slow(NamedTuple):
    slow: Any


class Pair(NamedTuple):
    w: Any
    b: Any


def averaged(inner: fs.GradientTransformation, named: bool = True) -> fs.GradientTransformation:
    """The average of all gradients so far, each with half the weight of the next."""

    def init(params: Any) -> Any:
        zeros = map_leaves(torch.zeros_like, params)
        return Slow(zeros) if named else zeros

    def update(run: Any, updates: Any, own: Any) -> tuple[Any, Any]:
        tree = own.slow if named else own
        _, slow = update_leaves(lambda u, s: (u, (s + u) / 2), updates, (tree,))
        return run(slow), Slow(slow) if named else slow

    return wrapping(inner, update, init)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [dict, Pair])
def test_entries_are_named_after_parameters(kind: Any, named: bool) -> None:
    params = kind(w=torch.ones(2), b=torch.ones(2))
    tx = averaged(fs.scale(-1.0), named)
    _, state = tx.update(params, tx.init(params))
    saved = state_dict(state)
    end = "wrapped/own/slow" if named else "wrapped/own"
    assert {n for n in saved if not n.startswith("funshampoo/")} == {f"w/{end}", f"b/{end}"}
    assert_equal(load_state_dict(tx.init(params), saved).state, state)


def test_it_is_its_parameters_in_the_wrapper() -> None:
    gone, stays = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = fs.Optimizer([gone, stays], averaged(fs.scale_by_learning_rate(1.0)))
    for _ in range(2):
        gone.grad, stays.grad = torch.full((2,), 100.0), torch.full((2,), 1.0)
        optimizer.step()
    del optimizer.state[stays]  # it starts from nothing
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    assert stays.tolist() == [-(1 / 2 + 3 / 4 + 1 / 2)] * 2
    assert "wrapped/own/slow" in optimizer.state[stays]
