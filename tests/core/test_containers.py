"""A state keeps the kinds of dicts that its parameters have: for optree they differ.

What else optree knows is refused in a state, of which checkpoints lost it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from functools import partial
from typing import Any

import optree
import pytest
import torch

import funshampoo as fs
from funshampoo.core.tree import map_leaves
from funshampoo.state import load_state_dict, state_dict


def _summed() -> fs.GradientTransformation:
    """A stage of a user's that knows nothing of `alive`."""

    def init(params: Any) -> Any:
        return map_leaves(torch.zeros_like, params)

    def update(updates: Any, state: Any) -> Any:
        total = map_leaves(torch.add, updates, state)
        return total, total

    return fs.GradientTransformation(init, update)


CHAINS = {
    "a guard around what knows of no presence": _summed,
    "moments that a new basis turns": lambda: fs.chain(
        fs.kronecker_statistics(0.9), fs.in_eigenbasis(fs.scale_by_adam(), every=1)
    ),
    "a mask before a stage that reads others": lambda: fs.chain(
        fs.kronecker_statistics(0.9), fs.masked(fs.root_inverse(every=1), {"z": True, "a": False})
    ),
    "micro-batches": lambda: fs.multi_steps(fs.trace(0.9), 2),
    "blocks and others": lambda: fs.muon(0.1),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize(
    "container", [OrderedDict, partial(defaultdict, None)], ids=["OrderedDict", "defaultdict"]
)
def test_dicts_stay_of_their_kind(make: Any, container: Any) -> None:
    params = container({"z": torch.ones(3, 2), "a": torch.ones(2)})
    tx = fs.guarded(make())
    state = tx.init(params)
    structure = optree.tree_structure(state)
    for t in range(3):
        g = map_leaves(lambda p, t=t: torch.full_like(p, math.nan if t == 1 else 1.0), params)
        updates, state = tx.update(g, state, params)
        assert optree.tree_structure(updates) == optree.tree_structure(params)
        assert optree.tree_structure(state) == structure
    loaded = load_state_dict(tx.init(params), state_dict(state)).state
    assert optree.tree_structure(loaded) == structure


def _of_two() -> fs.GradientTransformation:
    def init(params: Any) -> Any:
        return deque([map_leaves(torch.zeros_like, params), torch.zeros(())])

    return fs.GradientTransformation(init, lambda updates, state: (updates, state), "of_two")


def test_a_state_in_other_containers_is_refused() -> None:
    """optree knows more of them. A checkpoint was empty, and loaded as a fresh state."""
    params = {"a": torch.ones(2), "b": deque([torch.ones(3)])}
    message = r"the state of '\w+' has tensors in a deque, where checkpoints and guards"
    for tx in (fs.adamw(0.1), fs.muon(0.1), fs.guarded(fs.trace(0.9)), fs.schedule_free(0.1)):
        with pytest.raises(TypeError, match=message):
            tx.init(params)
    with pytest.raises(TypeError, match=message.replace(r"\w+", "of_two")):
        fs.chain(_of_two(), fs.scale(0.1)).init({"w": torch.ones(2)})
