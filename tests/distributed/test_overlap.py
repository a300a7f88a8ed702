"""Gradients that come portion by portion, the next while one is computed: the same numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import funshampoo as fs
from funshampoo.distributed import transfer
from funshampoo.distributed.parts import divided
from funshampoo.distributed.shards import OwnedRows
from tests.distributed.problems import Shapes, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.distributed.test_edits import EDITS, begun
from tests.distributed.test_parts import SOME, STEPS, placed, some_gradients, whole
from tests.trees import assert_equal


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers(1, 6)), max_size=9),
    st.integers(1, 5),
)
def test_every_row_is_in_one_portion_of_about_equal_work(problem: Any, portions: int) -> None:
    costs = {"a": 5.0, "b": 1.0, "c": 0.0}
    firsts = dict.fromkeys(costs, 0)
    owned = []
    for owner, stack, rows in sorted(problem):
        owned.append(OwnedRows(stack, firsts[stack], rows, owner))
        firsts[stack] += rows
    found = divided(owned, costs, portions)
    assert len(found) == portions

    def rows_of(pieces: list[OwnedRows]) -> list[tuple[int, str, int]]:
        return [(p.owner, p.stack, row) for p in pieces for row in p.all_rows]

    assert sorted(r for pieces in found for r in rows_of(pieces)) == sorted(rows_of(owned))
    for owner in range(4):
        works = [sum(costs[s] for o, s, _ in rows_of(p) if o == owner) for p in found]
        assert all(abs(work - sum(works) / portions) <= max(costs.values()) for work in works)
        order = [r for pieces in found for r in rows_of(pieces) if r[0] == owner]
        assert order == [r for r in rows_of(owned) if r[0] == owner]  # so rows count on


ONE: Shapes = {"w": (8, 8)}  # a block that one of the ranks owns


def gradients_of(shapes: Shapes, t: int) -> dict[str, Any]:
    return some_gradients(t) if shapes is SOME else tree(t, shapes)


def train_in_portions(
    rank: int, sharding: str, overlap: int, one: bool, donate: bool, options: dict[str, Any]
) -> Any:
    shapes = ONE if one else SOME

    def put(values: dict[str, Any]) -> dict[str, Any]:
        there = {name: x for name, x in values.items() if x is not None}
        return {**dict.fromkeys(values), **placed(there, sharding)}

    tx = optimizer({"overlap": overlap}, max_size=8, **options)
    params = put(tree(0, shapes))
    params, _ = train(tx, params, STEPS, lambda t: put(gradients_of(shapes, t)), donate=donate)
    return whole(params)


@pytest.mark.parametrize(
    ("size", "sharding", "overlap", "one", "donate", "options"),
    [
        (2, "rows of 2", 3, False, True, {"stagger": True}),
        (3, "rows of 3", 2, False, False, {}),
        (3, "rows of 3", 2, True, True, {}),
        (4, "hybrid", 4, False, True, {"tile": 64}),
        pytest.param(4, "both", 3, False, True, {}, marks=pytest.mark.slow),
        pytest.param(2, "columns of 2", 50, False, True, {}, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_of_one_process(
    ranks: Ranks,
    size: int,
    sharding: str,
    overlap: int,
    one: bool,
    donate: bool,
    options: dict[str, Any],
) -> None:
    """Bitwise, with gradients of None and NaN, more portions than blocks, ranks without blocks."""
    shapes = ONE if one else SOME
    tx = optimizer(None, max_size=8, **options)
    expected, _ = train(tx, tree(0, shapes), STEPS, lambda t: gradients_of(shapes, t))
    for found in ranks(size, train_in_portions, sharding, overlap, one, donate, options):
        assert_equal(found, expected)


def in_order(rank: int) -> list[str]:
    """What happens in a step: portions that are sent for, waited for, and computed."""
    happened: list[str] = []
    exchanged = transfer.all_to_all_into

    def noted(*args: Any, wait: bool = True) -> Any:
        happened.append("meet" if wait else "send for")
        arrived = exchanged(*args, wait=wait)

        def waited() -> None:
            happened.append("wait")
            arrived()

        return arrived if wait else waited

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        happened.append("compute")
        return updates, state

    stage = fs.GradientTransformation(lambda params: (), update, "notes")
    tx = fs.blocked(fs.sharded(stage, max_failures=None, overlap=3), 4)
    params = placed({"w": tree(0, {"w": (24, 8)})["w"]}, "rows of 2")
    state = tx.init(params)
    transfer.all_to_all_into = noted
    try:
        tx.update(params, state, params)
    finally:
        transfer.all_to_all_into = exchanged
    return happened


def test_all_portions_are_on_their_way_before_the_first_is_computed(ranks: Ranks) -> None:
    for happened in ranks(2, in_order):
        assert happened[:3] == ["send for"] * 3
        assert happened[3:9] == ["wait", "compute"] * 3
        assert happened[9:] == ["wait"] * 3 + ["meet"]  # those that were waited for cost nothing


def fails_midway(rank: int, guilty: int) -> Any:
    """An error in the second portion of one rank; then another training in the same group."""
    portions = 0

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        nonlocal portions
        portions += 1
        if dist.get_rank() == guilty and portions == 2:
            raise KeyError("mine")
        return updates, state

    stage = fs.GradientTransformation(lambda params: (), update, "fails")
    tx = fs.blocked(fs.sharded(stage, max_failures=None, overlap=3), 4)
    params = placed(tree(0, SOME), "rows of 3")
    state, said = tx.init(params), "went on"
    try:
        tx.update(params, state, params)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, portions, train_in_portions(rank, "rows of 3", 2, False, True, {})


def test_an_error_in_the_second_portion_is_an_error_on_all(ranks: Ranks) -> None:
    tx = optimizer(None, max_size=8)
    expected, _ = train(tx, tree(0, SOME), STEPS, lambda t: gradients_of(SOME, t))
    for rank, (said, portions, after) in enumerate(ranks(3, fails_midway, 1)):
        assert said.startswith("KeyError" if rank == 1 else "RuntimeError: sharded: the optimizer")
        assert portions == 2 if rank == 1 else portions > 2
        assert_equal(after, expected)


def edits(rank: int) -> str:
    """One rank edits what makes a new chain, and the others step on."""
    params, opt = begun("parts", distribute=functools.partial(fs.sharded, overlap=3))
    edit, _ = EDITS["remove"]
    if rank == 1:
        edit(opt, params)
    try:
        opt.step()
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_a_rank_with_an_edit_meets_the_others_in_all_collectives(ranks: Ranks) -> None:
    for said in ranks(2, edits):
        assert EDITS["remove"][1] in said


def differs(rank: int) -> str:
    tx = optimizer({"overlap": 2 + rank}, max_size=8)
    params = placed(tree(0, SOME), "rows of 2")
    try:
        tx.update(params, tx.init(params), params)
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_another_number_of_portions_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    for said in ranks(2, differs):
        assert "overlap" in said


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_a_number_of_portions_is_a_count(bad: Any, error: Any) -> None:
    with pytest.raises(error, match="overlap"):
        fs.sharded(fs.scale(1.0), overlap=bad)
