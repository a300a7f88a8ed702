"""Owners of blocks: balanced, complete, the same on every rank."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funshampoo.blocks.layout import Stack
from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ownership import longest_processing_time, owners_of

BYTES_ALONE = CostModel(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def stack(*block: int, rows: int) -> Stack:
    return Stack(block, torch.float32, torch.device("cpu"), rows)


def loads(costs: list[float], owners: list[int], world_size: int) -> list[float]:
    totals = [0.0] * world_size
    for cost, rank in zip(costs, owners):
        totals[rank] += cost
    return totals


def smallest_possible(costs: list[float], world_size: int) -> float:
    everything = itertools.product(range(world_size), repeat=len(costs))
    return min(max(loads(costs, list(owners), world_size)) for owners in everything)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50).map(float), min_size=1, max_size=7), st.integers(1, 3))
def test_never_above_grahams_bound(costs: list[float], world_size: int) -> None:
    owners = longest_processing_time(costs, world_size)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(world_size))
    bound = (4 / 3 - 1 / (3 * world_size)) * smallest_possible(costs, world_size)
    assert max(loads(costs, owners, world_size)) <= bound * (1 + 1e-12)


def test_grahams_bound_is_met_where_it_is_known_to_be() -> None:
    """The classic worst case: 2 ranks, {3, 3, 2, 2, 2} gives 7 where 6 is possible."""
    costs = [3.0, 3.0, 2.0, 2.0, 2.0]
    assert max(loads(costs, longest_processing_time(costs, 2), 2)) == 7
    assert smallest_possible(costs, 2) == 6


def test_ties_go_by_index_and_lowest_rank() -> None:
    assert longest_processing_time([1.0] * 5, 3) == [0, 1, 2, 0, 1]
    assert longest_processing_time([], 3) == []


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_costs_that_are_none(bad: float) -> None:
    with pytest.raises(ValueError, match=r"costs\[1\]"):
        longest_processing_time([1.0, bad], 2)


@pytest.mark.parametrize(
    ("world_size", "every", "error", "name"),
    [
        (0, 10, ValueError, "world_size"),
        (2.0, 10, TypeError, "world_size"),
        (2, 0, ValueError, "every"),
        (2, True, TypeError, "every"),
    ],
)
def test_numbers_out_of_range(world_size: Any, every: Any, error: Any, name: str) -> None:
    with pytest.raises(error, match=name):
        owners_of({"8": stack(8, rows=2)}, world_size, every)


STACKS = {
    "1024x1024": stack(1024, 1024, rows=7),
    "1024x8": stack(1024, 8, rows=4),
    "90x91": stack(90, 91, rows=40),
    "64": stack(64, rows=9),
    "scalar": stack(rows=3),
}
THIN = {"90x91": stack(90, 91, rows=240), "1024x8": stack(1024, 8, rows=5)}


def test_every_block_has_one_owner_and_rows_of_an_owner_are_consecutive() -> None:
    for world_size in (1, 2, 5, 100):
        owners = owners_of(STACKS, world_size, 10)
        assert list(owners) == list(STACKS)
        for name, ranks in owners.items():
            assert len(ranks) == STACKS[name].rows
            assert list(ranks) == sorted(ranks)
            assert set(ranks) <= set(range(world_size))


def test_what_comes_back_is_the_callers() -> None:
    """Results are remembered; a caller who edits one does not edit the next."""
    first = owners_of(STACKS, 2, 10)
    expected = dict(first)
    first.clear()
    assert owners_of(STACKS, 2, 10) == expected
    assert owners_of(THIN, 4, 10, BYTES_ALONE) != owners_of(THIN, 4, 10)


def test_18_ranks_are_balanced_by_work_not_by_bytes() -> None:
    """1024×8 has the bytes of 90×91 and 75 times its work."""
    assert BYTES_ALONE.block((1024, 8), 10) == pytest.approx(BYTES_ALONE.block((90, 91), 10), 1e-3)
    assert CostModel().block((1024, 8), 10) > 20 * CostModel().block((90, 91), 10)

    def balance(model: CostModel) -> float:
        owners = owners_of(THIN, 4, 10, model)
        work = [(CostModel().block(THIN[s].block, 10), r) for s in THIN for r in owners[s]]
        times = loads([cost for cost, _ in work], [rank for _, rank in work], 4)
        return max(times) / (sum(times) / 4)

    assert balance(CostModel()) < 1.01
    assert balance(BYTES_ALONE) > 1.3  # the fixture provokes the mistake
