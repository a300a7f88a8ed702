"""Sharded = single: any number of ranks gives the bits of one process."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist

import funshampoo as fs
from funshampoo.plan.planner import plan
from funshampoo.state import ShardedState, find_state, merged, state_dict
from tests.distributed.problems import SHAPES, SMALL, Shapes, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal, assert_unchanged, snapshot, tensors

STEPS = 14  # the fourth refresh of every=4 is the last but two


def run(rank: int, options: dict[str, Any], sharding: dict[str, Any] | None) -> Any:
    return train(optimizer(sharding, **options), tree(0), range(1, STEPS + 1), tree)[0]


CHAINS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"grafting": "adam"}, (1, 2, 3, 4)),
    ({"grafting": "adam", "stagger": True}, (2,)),
    ({"grafting": "rms", "nesterov": True}, (3,)),
    ({"grafting": "adagrad", "beta2": 1.0}, (4,)),
    ({"grafting": "sgd", "start": 3}, (2,)),
    ({"grafting": None, "stagger": True}, (3,)),
    ({"tile": 600, "grafting": "adam"}, (1, 3)),  # several tiles on each rank
    ({"packed": True, "stagger": True}, (3,)),
    ({"statistics_every": 2, "sides": "smaller", "exponents": "shampoo_squared"}, (2,)),
    ({"statistics_every": 3, "exponents": 1 / 3, "own_steps": False}, (3,)),
    ({"packed": True, "product_dtype": torch.bfloat16, "max_size": 32}, (3,)),
]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [pytest.param(*c, marks=[] if i < 4 else [pytest.mark.slow]) for i, c in enumerate(CHAINS)],
    ids=str,
)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    ranks: Ranks, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    (expected,) = ranks(1, run, options, None)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0))))
    for size in sizes:
        for got in ranks(size, run, options, {}):
            assert_equal(got, expected)


def states(rank: int, sharding: dict[str, Any] | None) -> Any:
    params, state = train(optimizer(sharding), tree(0), range(1, 8), tree)
    return params, state_dict(state), sum(x.nbytes for x in tensors(state))


def test_all_state_is_on_its_owner_alone(ranks: Ranks) -> None:
    """Statistics, roots, moments and momentum: together the single run's, and each once."""
    ((_, whole, single_bytes),) = ranks(1, states, None)
    found = ranks(3, states, {})
    parts = [saved for _, saved, _ in found]
    together = merged(parts)
    assert together.keys() == whole.keys()
    for name, x in whole.items():
        assert torch.equal(together[name], x), name
    counters = [name for name, x in whole.items() if "/block" not in name]
    assert all(whole[name].ndim == 0 for name in counters if name != "funshampoo/part")
    for name in whole:
        holders = sum(name in part for part in parts)
        assert holders == (3 if name in counters else 1), name
    counter_bytes = 8 * (len(counters) - 2)  # without the format's version, and which part it is
    report_bytes = 16 + 8  # with the number of the run
    expected = single_bytes + 2 * counter_bytes + 3 * report_bytes
    assert sum(size for _, _, size in found) == expected
    assert max(size for _, _, size in found) < 0.45 * single_bytes  # and it is shared evenly


def donated_and_not(rank: int) -> Any:
    tx, steps = optimizer({}), range(1, 10)
    pure = params = tree(0)
    state, history = tx.init(params), []
    for t in steps:
        g = tree(t)
        before = snapshot(g, state, pure)
        again, _ = tx.update(g, state, pure)
        updates, new = tx.update(g, state, pure)
        assert_unchanged(before, g, state, pure)
        assert_equal(updates, again)  # nothing is hidden in the transformation
        state, pure = new, fs.apply_updates(pure, updates)
        history.append(updates)
    donated, kept = tx.init(params), []
    for t in steps:
        updates, donated = tx.update(tree(t), donated, params, donate=True)
        params = fs.apply_updates(params, updates)
        kept.append(updates)
    assert_equal((params, donated), (pure, state))
    assert_equal(kept, history)  # later steps reuse memory, but not that of these
    return pure


def test_a_donated_state_gives_the_same_and_a_pure_update_writes_to_nothing(ranks: Ranks) -> None:
    first, *others = ranks(3, donated_and_not)
    for other in others:
        assert_equal(other, first)


# Communication in half precision.


def rounded_updates(rank: int, dtype: torch.dtype) -> Any:
    """Updates that do not depend on the parameters, sharded and not."""
    options: dict[str, Any] = {"weight_decay": 0.0}
    alone, shared = optimizer(**options), optimizer({"communication_dtype": dtype}, **options)
    params = tree(0)
    states = [alone.init(params), shared.init(params)]
    history = []
    for t in range(1, 9):
        exact, states[0] = alone.update(tree(t), states[0], params)
        updates, states[1] = shared.update(tree(t), states[1], params)
        for a, b in zip(tensors(exact), tensors(updates)):
            assert torch.equal(a.to(dtype).float(), b)
        history.append(updates)
    return history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_updates_are_rounded_once_for_the_way(ranks: Ranks, dtype: torch.dtype) -> None:
    """The owner uses the rounded ones too: all ranks have the same bits."""
    first, second, third = ranks(3, rounded_updates, dtype)
    assert_equal(second, first)
    assert_equal(third, first)


def test_training_in_bfloat16_stays_within_its_rounding(ranks: Ranks) -> None:
    """Every step's update is off by 2^-8 of itself at most, decay through the parameters too."""
    (expected,) = ranks(1, run, {}, None)
    found = ranks(2, run, {}, {"communication_dtype": torch.bfloat16})
    assert_equal(found[1], found[0])
    travelled = 0.01 * STEPS * 10  # learning rate, steps, and momentum's gain
    for a, b in zip(tensors(found[0]), tensors(expected)):
        assert not torch.equal(a, b)
        assert (a - b).norm() <= 2**-8 * travelled * b.numel() ** 0.5


# Leaves instead of blocks, and other trees.


def zero(rank: int, shard: bool) -> Any:
    adam = fs.scale_by_adam()
    tx = fs.chain(fs.sharded(adam) if shard else adam, fs.scale_by_learning_rate(0.01))
    shapes = SHAPES | {"empty": (0, 4)}
    params = {"a": tree(0, shapes), "b": [tree(9, SMALL)["w"].bfloat16()]}

    def gradient(t: int) -> Any:
        return {"a": tree(t, shapes), "b": [tree(-t, SMALL)["w"].bfloat16()]}

    params, state = train(tx, params, range(1, 13), gradient)
    return params, sorted(state_dict(state))


def test_leaf_by_leaf_it_is_zero_1(ranks: Ranks) -> None:
    ((expected, names),) = ranks(1, zero, False)
    for size in (1, 2, 4):
        found = ranks(size, zero, True)
        for got, _ in found:
            assert_equal(got, expected)
        shared = ("funshampoo/format", "funshampoo/part", "clock/steps")
        held = [name for _, mine in found for name in mine if name not in shared]
        assert sorted(held) == [name for name in names if name not in shared]


FEW: Shapes = {"w": (9, 9), "empty": (0, 3), "bias": (3,)}


def few(rank: int, sharding: dict[str, Any] | None) -> Any:
    tx = optimizer(sharding)
    params, state = train(tx, tree(0, FEW), range(1, 10), lambda t: tree(t, FEW))
    found = find_state(state, ShardedState)
    return params, None if found is None else found.owned


def test_more_ranks_than_blocks(ranks: Ranks) -> None:
    ((expected, _),) = ranks(1, few, None)
    found = ranks(4, few, {})
    for got, _ in found:
        assert_equal(got, expected)
    assert [owned for _, owned in found].count({}) == 2


def mixed(rank: int, sharding: dict[str, Any] | None) -> Any:
    def cast(t: int) -> Any:
        g = tree(t, SMALL)
        return g | {"w": g["w"].double(), "kernel": g["kernel"].bfloat16()}

    return train(optimizer(sharding, max_size=8), cast(0), range(1, 10), cast)[0]


def test_several_dtypes_in_one_tree(ranks: Ranks) -> None:
    """Gathered in the widest, so that nothing is lost."""
    (expected,) = ranks(1, mixed, None)
    assert {x.dtype for x in tensors(expected)} == {torch.float64, torch.float32, torch.bfloat16}
    for got in ranks(3, mixed, {}):
        assert_equal(got, expected)


def in_groups(rank: int) -> Any:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tx = optimizer({"process_group": groups[rank // 2]}, max_size=8)
    params, state = train(tx, tree(0, SMALL), range(1, 10), lambda t: tree(t, SMALL))
    return params, find_state(state, ShardedState)


def test_sharded_within_a_group_and_replicated_across(ranks: Ranks) -> None:
    expected, _ = train(
        optimizer(max_size=8), tree(0, SMALL), range(1, 10), lambda t: tree(t, SMALL)
    )
    found = ranks(4, in_groups)
    for got, _ in found:
        assert_equal(got, expected)
    owned = [state.owned for _, state in found]
    assert owned[0] == owned[2] != owned[1] == owned[3]
    assert_equal(found[0][1], found[2][1])
    assert_equal(found[1][1], found[3][1])


# Gradients that are None, or not averaged.


def with_absent(rank: int, sharding: dict[str, Any] | None, where: str) -> Any:
    """At steps 2, 3 and 4 (a refresh) "w" has no gradient, on all ranks or on one."""

    def gradient(t: int) -> Any:
        absent = t in (2, 3, 4) and (where == "everywhere" or rank == int(where))
        return tree(t, SMALL) | ({"w": None} if absent else {})

    tx = optimizer(sharding, max_size=8)
    params, state = train(tx, tree(0, SMALL), range(1, 10), gradient)
    return params, state_dict(state)


def test_none_on_all_ranks_leaves_a_parameter_alone(ranks: Ranks) -> None:
    """Neither momentum nor decay moves it, as on one rank."""
    ((expected, whole),) = ranks(1, with_absent, None, "everywhere")
    for size in (2, 3):
        found = ranks(size, with_absent, {}, "everywhere")
        for got, _ in found:
            assert_equal(got, expected)
        together = merged([saved for _, saved in found])
        assert together.keys() == whole.keys()
        assert all(torch.equal(together[name], x) for name, x in whole.items())


@pytest.mark.parametrize("where", ["0", "1"])
def test_none_on_one_rank_is_the_owners_verdict(ranks: Ranks, where: str) -> None:
    """Blocks that this rank owns miss the steps, the others do not; all ranks are equal."""
    ((missed, _),) = ranks(1, with_absent, None, "everywhere")
    ((seen, _),) = ranks(1, with_absent, None, "9")
    (first, own), (second, _) = ranks(2, with_absent, {}, where)
    assert_equal(first, second)
    assert_equal(first["bias"], seen["bias"])
    owners = {name.split("/")[1] for name in own if name.startswith("w/")}
    for i in range(3):
        for j in range(2):
            block = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
            here = (f"block_{i}_{j}" in owners) == (where == "0")  # the owner had no gradient
            assert torch.equal(first["w"][block], (missed if here else seen)["w"][block])
            assert not torch.equal(missed["w"][block], seen["w"][block])


def leaf_absent(rank: int, shard: bool, where: int) -> Any:
    adam = fs.scale_by_adam()
    tx = fs.chain(fs.sharded(adam) if shard else adam, fs.scale_by_learning_rate(0.01))

    def gradient(t: int) -> Any:
        absent = t in (2, 3) and where in (-1, rank)
        return tree(t, SMALL) | ({"w": None} if absent else {})

    return train(tx, tree(0, SMALL), range(1, 7), gradient)[0]


def test_none_leaf_by_leaf(ranks: Ranks) -> None:
    (expected,) = ranks(1, leaf_absent, False, -1)
    for got in ranks(2, leaf_absent, True, -1):
        assert_equal(got, expected)
    for where in (0, 1):
        first, second = ranks(2, leaf_absent, True, where)
        assert_equal(first, second)


def not_averaged(rank: int) -> Any:
    return train(optimizer({}), tree(0), range(1, 10), lambda t: tree(10 * t + rank))[0]


def test_ranks_stay_equal_even_with_gradients_that_are_not(ranks: Ranks) -> None:
    first, *others = ranks(3, not_averaged)
    for other in others:
        assert_equal(other, first)


# What is sent.


COLLECTIVES = ["all_reduce", "broadcast", "all_gather", "all_gather_object", "barrier", "reduce"]
GATHER = "all_gather_into_tensor"


def sent(rank: int, sharding: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(collective, bytes received, bytes sent) of every call in five steps."""
    names = [GATHER, "all_gather_single", *COLLECTIVES]  # the second is its name from torch 2.13
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    seen = []

    def watch(name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            sizes = [x.nbytes for x in arguments if isinstance(x, torch.Tensor)]
            seen.append((name.replace("all_gather_single", GATHER), *sizes))
            return originals[name](*arguments, **keywords)

        return call

    for name in originals:
        setattr(dist, name, watch(name))
    try:
        train(optimizer(sharding), tree(0), range(1, 6), tree)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return seen


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_one_gather_a_step_of_what_was_planned(ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Each rank sends its part, padded to the largest, and nothing else is communicated."""
    itemsize = 4 if dtype is None else 2
    planned = plan(SHAPES, 3, max_size=16, every=4, communication_dtype=dtype)
    assert planned.gathered_bytes < 1.5 * itemsize * planned.elements
    for calls in ranks(3, sent, {"communication_dtype": dtype}):
        assert calls[0] == (GATHER, 3 * 48, 48)  # before the first step they agree
        assert len(calls) == 1 + 5
        for name, whole, shard in calls[1:]:
            assert name == GATHER
            assert whole == 3 * shard
            status_and_padding = shard - planned.gathered_bytes / 3
            assert 32 <= status_and_padding < 32 + 4 * itemsize


def test_the_state_has_no_leaf_beyond_its_tensors() -> None:
    """Who owns what is written in keys: vmap, pytrees and torch.save see tensors alone."""
    state = optimizer({}).init(tree(0))
    assert all(isinstance(x, torch.Tensor) for x in optree.tree_leaves(state))


# What was once wrong where one rank has everything, or sees everything fail.


def then_decay(rank: int) -> Any:
    """One block, so one rank owns all; a stage that follows has to see the same on both."""
    tx = fs.chain(fs.blocked(fs.sharded(fs.trace(0.9)), 16), fs.add_decayed_weights(0.1))
    params = {"w": torch.ones(3, 3)}
    updates, _ = tx.update({"w": None}, tx.init(params), params)
    return fs.apply_updates(params, updates)


def test_a_stage_after_the_blocks_sees_the_same_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks(2, then_decay)
    assert_equal(first, second)


def accumulated(rank: int) -> Any:
    """Every micro-gradient of rank 0 is NaN in the first of two real steps."""
    tx = fs.multi_steps(optimizer({}, max_size=8), 2)

    def gradient(t: int) -> Any:
        broken = rank == 0 and t <= 2
        return {name: g * float("nan") if broken else g for name, g in tree(t, SMALL).items()}

    return train(tx, tree(0, SMALL), range(1, 5), gradient)[0]


def accumulated_without_a_guard(rank: int) -> Any:
    tx = fs.multi_steps(fs.sharded(fs.scale_by_adam()), 2)

    def gradient(t: int) -> Any:
        return {name: g * (float("nan") if t <= 2 else 1) for name, g in tree(t, SMALL).items()}

    return train(tx, tree(0, SMALL), range(1, 5), gradient)[0]


def test_accumulation_that_skips_all_needs_no_guard(ranks: Ranks) -> None:
    for got in ranks(2, accumulated_without_a_guard):
        assert all(torch.isfinite(x).all() for x in tensors(got))


def seeded(rank: int, saved: Any) -> dict[str, torch.Tensor]:
    tx = fs.shampoo(0.1, max_size=8, distribute=fs.sharded)
    state = tx.init({"w": torch.zeros(20, 11)})
    return fs.state.state_dict(fs.state.seed_from_adamw(state, saved, ["w"]))


def test_seeds_reach_every_block_of_every_rank(ranks: Ranks) -> None:
    leaf = torch.randn(20, 11).requires_grad_()
    adamw = torch.optim.AdamW([leaf])
    leaf.grad = torch.randn(20, 11)
    adamw.step()
    saved = adamw.state_dict()
    (alone,) = ranks(1, seeded, saved)
    together = fs.state.merged(ranks(3, seeded, saved))
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], x) for name, x in alone.items())


def test_accumulation_that_skips_all_on_one_rank(ranks: Ranks) -> None:
    first, second = ranks(2, accumulated)
    assert all(torch.isfinite(x).all() for x in tensors(first))
    assert_equal(first, second)
