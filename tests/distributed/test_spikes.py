"""Spikes on many ranks: each owner judges its blocks, bit for bit as one process does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.state import SpikeState, find_state, merged, state_dict
from tests.distributed.problems import held_here, optimizer, report_of, train, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

STEPS = range(1, 31)


def gradient(t: int) -> dict[str, Tensor]:
    """One block of "even" has outliers, "deep" another scale for good, "head" a NaN besides."""
    g = tree(t)
    if t in (20, 25, 26):
        g["even"][:16, :16] *= 1e6
    if t >= 22:
        g["deep"] *= 1e4
    if t == 25:
        g["head"][3, 3] = float("nan")
    return g


def run(rank: int, sharding: dict[str, Any] | None) -> Any:
    tx = optimizer(sharding, spike_factor=20.0)
    params, state = train(tx, tree(0), STEPS, gradient)
    spikes = find_state(state, SpikeState)
    assert spikes is not None
    count = sum(int(n.sum()) for n in spikes.held.values())
    report = None if sharding is None else report_of(state)
    return params, state_dict(state), count, held_here(state), report


def test_any_number_of_ranks_judges_alike(ranks: Ranks) -> None:
    ((expected, whole, spikes, held, _),) = ranks(1, run, None)
    assert spikes > 10  # "deep" has several blocks
    assert held > spikes  # and a NaN
    for size in (2, 3):
        found = ranks(size, run, {"every": 1})
        for got, *_ in found:
            assert_equal(got, expected)
        assert sum(count for _, _, count, _, _ in found) == spikes
        assert sum(here for _, _, _, here, _ in found) == held
        assert all(report[0] == held for *_, report in found)
        together = merged([saved for _, saved, _, _, _ in found])
        assert together.keys() == whole.keys()
        for name, x in whole.items():
            assert torch.equal(together[name], x), name
