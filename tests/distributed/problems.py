"""Trees, chains and loops that the tests on several ranks share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.state import state_dict
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import GuardedState, ShardedState

Shapes = dict[str, tuple[int, ...]]
# Ragged at 16, with odd sides of 9 and more, orders 0 to 4, and stacks of one block and of many.
SHAPES: Shapes = {
    "conv": (9, 5, 3, 3),
    "deep": (20, 17, 3),
    "embedding": (45, 21),
    "even": (32, 48),
    "head": (11, 13),
    "narrow": (27, 1),
    "scalar": (),
    "vector": (37,),
}
SMALL: Shapes = {"w": (20, 13), "kernel": (6, 3, 2), "bias": (9,), "scale": ()}


def tree(seed: int, shapes: Shapes = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def optimizer(sharding: dict[str, Any] | None = None, **options: Any) -> fs.GradientTransformation:
    """Shampoo; `sharding` are the options of `sharded`, None is a chain for one process."""
    distribute = None if sharding is None else functools.partial(fs.sharded, **sharding)
    defaults = {"every": 4, "max_size": 16, "momentum": 0.9, "weight_decay": 0.01}
    return fs.shampoo(0.01, distribute=distribute, **(defaults | options))


def train(
    tx: fs.GradientTransformation,
    params: Any,
    steps: range,
    gradient: Callable[[int], Any],
    state: Any = None,
    donate: bool = True,
) -> tuple[Any, Any]:
    """(parameters, state) after these steps; `gradient(t)` is that of step t, from 1."""
    state = tx.init(params) if state is None else state
    for t in steps:
        updates, state = tx.update(gradient(t), state, params, donate=donate)
        params = fs.apply_updates(params, updates)
    return params, state


def block_state(state: Any) -> dict[str, Tensor]:
    """Copies of all per-block (per-leaf) tensors by name, without the guard's own counters."""
    return {
        name: x.clone()
        for name, x in state_dict(state).items()
        if ("/block" in name or name.split("/")[0] in SHAPES) and "guarded" not in name
    }


def report_of(state: Any) -> list[int]:
    """Blocks held, their longest streak; roots failed, their longest streak; over all ranks."""
    found = find_state(state, ShardedState)
    assert found is not None
    return [int(n) for n in found.report]


def held_here(state: Any) -> int:
    found = find_state(state, GuardedState)
    assert found is not None
    return sum(int(n.sum()) for n in found.held.values())
