"""Sharded parameters: whatever a rank holds of them, the numbers are those of one process."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import funshampoo as fs
from funshampoo.distributed.gathering import spreads
from tests.distributed.problems import Shapes, block_state, held_here, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

STEPS = range(1, 10)


def placements_of(sharding: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[Any]]:
    """(shape of the mesh, placements) of one parameter, on 2 or 4 ranks."""
    last = Shard(len(shape) - 1) if shape else Replicate()
    first = Shard(0) if shape else Replicate()
    return {
        "rows of 2": ((2,), [first]),
        "rows of 3": ((3,), [first]),
        "rows of 4": ((4,), [first]),
        "columns of 2": ((2,), [last]),
        "replicated": ((2,), [Replicate()]),
        "hybrid": ((2, 2), [Replicate(), first]),
        "both": ((2, 2), [first, last]),
    }[sharding]


def placed(values: dict[str, Tensor], sharding: str) -> dict[str, DTensor]:
    sides, _ = placements_of(sharding, ())
    mesh = init_device_mesh("cpu", sides)  # one for all: each makes process groups
    return {
        name: distribute_tensor(x, mesh, placements_of(sharding, tuple(x.shape))[1])
        for name, x in values.items()
    }


def whole(tree: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x.full_tensor() for name, x in tree.items()}


def train_placed(rank: int, sharding: str, options: dict[str, Any]) -> dict[str, Tensor]:
    tx = optimizer({}, **options)
    params = placed(tree(0), sharding)
    params, _ = train(tx, params, STEPS, lambda t: placed(tree(t), sharding))
    return whole(params)


@pytest.mark.parametrize(
    ("size", "sharding"),
    [
        (2, "rows of 2"),
        (2, "columns of 2"),
        (2, "replicated"),
        (4, "rows of 4"),
        (4, "hybrid"),
        pytest.param(4, "both", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_of_one_process(ranks: Ranks, size: int, sharding: str) -> None:
    expected, _ = train(optimizer(), tree(0), STEPS, tree)
    for found in ranks(size, train_placed, sharding, {}):
        for name, x in expected.items():
            assert torch.equal(found[name], x), name


# What goes wrong, and what is not there.

SOME: Shapes = {"w": (12, 10), "u": (9, 7), "v": (12, 10), "b": (6,)}


def some_gradients(t: int) -> dict[str, Tensor | None]:
    """Without one for `u` now and then, and with a number that is none in one block of `w`."""
    found: dict[str, Tensor | None] = dict(tree(t, SOME))
    if t % 3 == 1:
        found["u"] = None
    if t == 4:
        found["w"] = torch.where(torch.arange(120).view(12, 10) == 119, math.nan, found["w"])
    return found


def train_some(rank: int, sharding: str | None, dtype: torch.dtype | None = None) -> Any:
    cast = (lambda x: x) if dtype is None else (lambda x: None if x is None else x.to(dtype))

    def put(values: dict[str, Any]) -> dict[str, Any]:
        values = {name: cast(x) for name, x in values.items()}
        if sharding is None:
            return values
        there = {name: x for name, x in values.items() if x is not None}
        return {**dict.fromkeys(values), **placed(there, sharding)}

    tx = optimizer(None, max_size=8, momentum=0.9)
    params, state = train(tx, put(tree(0, SOME)), STEPS, lambda t: put(some_gradients(t)))
    held = held_here(state)
    return params if sharding is None else whole(params), held


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_gradients_that_are_missing_or_not_finite(ranks: Ranks, dtype: torch.dtype | None) -> None:
    expected, held = train_some(0, None, dtype)
    assert held == 1
    found = ranks(4, train_some, "both", dtype)
    assert sum(held for _, held in found) == 1
    for params, _ in found:
        assert_equal(params, expected)


def fails(rank: int, guilty: int, sharding: str) -> str:
    """One rank has an error in its step, of which the others hear in the collective."""

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        if dist.get_rank() == guilty:
            raise KeyError("mine")
        return updates, state

    stage = fs.GradientTransformation(lambda params: (), update, "fails")
    tx = fs.blocked(fs.sharded(stage, max_failures=None), 8)
    params = placed(tree(0, SOME), sharding)
    try:
        tx.update(params, tx.init(params), params)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_an_error_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    for rank, said in enumerate(ranks(3, fails, 1, "rows of 3")):
        assert said.startswith("KeyError" if rank == 1 else "RuntimeError: sharded: the optimizer")
        assert rank == 1 or "rank 1 of 3" in said


def partial(rank: int) -> Any:
    """Sequence parallelism leaves sums to be done."""
    mesh = init_device_mesh("cpu", (2,))
    values = tree(0, SOME)
    params = {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in values.items()}
    halves = {n: DTensor.from_local(x / 2, mesh, [Partial()]) for n, x in tree(1, SOME).items()}
    tx = optimizer(None, max_size=8)
    updates, _ = tx.update(halves, tx.init(params), params)
    return {n: tuple(u.placements) == (Shard(0),) for n, u in updates.items()}, whole(updates)


def test_partial_gradients_are_added_up(ranks: Ranks) -> None:
    tx, params = optimizer(None, max_size=8), tree(0, SOME)
    expected, _ = tx.update(tree(1, SOME), tx.init(params), params)
    for as_placed, updates in ranks(2, partial):
        assert all(as_placed.values())
        assert_equal(updates, expected)


def rounded(rank: int, sharding: str | None) -> Any:
    tx = optimizer({"communication_dtype": torch.bfloat16}, max_size=8)
    put = (lambda x: x) if sharding is None else (lambda x: placed(x, sharding))
    params, _ = train(tx, put(tree(0, SOME)), STEPS, lambda t: put(tree(t, SOME)))
    return params if sharding is None else whole(params)


def test_updates_are_rounded_for_the_way_as_those_of_whole_parameters(ranks: Ranks) -> None:
    expected = ranks(2, rounded, None)[0]
    for found in ranks(4, rounded, "hybrid"):
        assert_equal(found, expected)


def with_too_small_a_group(rank: int) -> str:
    values = placed(tree(0, SOME), "rows of 2")
    alone = [dist.new_group([r]) for r in range(2)][rank]
    tx = fs.shampoo(0.1, distribute=functools.partial(fs.sharded, process_group=alone))
    try:
        tx.init(values)
    except RuntimeError as error:
        return str(error)
    return "went on"


def other_parameters(rank: int) -> str:
    shapes = SOME if rank == 0 else {**SOME, "u": (9, 8)}
    try:
        fs.shampoo(0.1).init(placed(tree(0, shapes), "rows of 2"))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_what_does_not_fit_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for said in ranks(2, with_too_small_a_group):
        assert "give sharded a group with all ranks" in said
    for said in ranks(2, other_parameters):
        assert "parameter 1 is 'u', (9, 7)" in said.replace("parameter 2", "parameter 1")


def not_distributed(rank: int) -> str:
    params = placed(tree(0, SOME), "rows of 2")
    try:
        fs.blocked(fs.trace(0.9)).init(params)
    except TypeError as error:
        return str(error)
    return "went on"


def test_blocks_of_parts_need_ranks_that_share(ranks: Ranks) -> None:
    for said in ranks(2, not_distributed):
        assert "'b' is a DTensor" in said or "'w' is a DTensor" in said
        assert "blocked(sharded(...))" in said


def within_the_shards(rank: int) -> Any:
    """HSDP with owners among the ranks that shard, and a copy of them for every replica."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))

    def put(values: dict[str, Tensor]) -> dict[str, DTensor]:
        return {n: distribute_tensor(x, mesh, [Replicate(), Shard(0)]) for n, x in values.items()}

    group = mesh.get_group("shards")
    tx = optimizer({"process_group": group}, max_size=8)
    params, state = train(tx, put(tree(0, SOME)), STEPS, lambda t: put(tree(t, SOME)))
    return whole(params), sum(x.numel() for x in block_state(state).values())


def test_owners_may_stay_within_the_ranks_that_shard(ranks: Ranks) -> None:
    expected, state = train(
        optimizer(None, max_size=8), tree(0, SOME), STEPS, lambda t: tree(t, SOME)
    )
    found = ranks(4, within_the_shards)
    for params, _ in found:
        assert_equal(params, expected)
    everything = sum(x.numel() for x in block_state(state).values())
    assert sum(n for _, n in found) == 2 * everything


def trained_again(rank: int) -> Any:
    """One chain for other placements of the same parameters, and for whole ones that grow."""
    tx, gone = optimizer({}, max_size=8), []
    (spread,) = spreads(tx)
    for sharding in ("rows of 2", "columns of 2", "replicated", "rows of 2"):
        values, gradients = (placed(tree(t, SOME), sharding) for t in (0, 1))
        train(tx, values, range(1, 3), lambda t: gradients)  # noqa: B023
        (known,) = spread.known_parts.values()
        gone += [weakref.ref(memory["sent"][0]) for memory in known.memory.values()]
    gc.collect()
    for rows in range(8, 88, 8):
        shapes = {"w": (rows, 8)}
        train(tx, tree(0, shapes), range(1, 3), lambda t: tree(t, shapes))  # noqa: B023
    return [ref() is None for ref in gone], len(spread.memory)


def test_buffers_of_parameters_that_are_gone_are_let_go(ranks: Ranks) -> None:
    for gone, lengths in ranks(2, trained_again):
        assert gone == [True, True, True, False]
        assert lengths <= 4


def of_another_dtype(rank: int) -> Any:
    """Gradients in float32 of parameters in bfloat16, of which some are missing now and then."""
    tx = optimizer({}, max_size=8)
    params = placed({n: x.bfloat16() for n, x in tree(0, SOME).items()}, "rows of 2")

    def some(t: int) -> dict[str, Any]:
        found = placed(tree(t, SOME), "rows of 2")
        return {n: None if t > 1 and t >> i & 1 else x for i, (n, x) in enumerate(found.items())}

    params, state = train(tx, params, range(1, 17), some)
    (spread,) = spreads(tx)
    (known,) = spread.known_parts.values()
    before, said = whole(params), "went on"
    alone = some(1)
    if rank == 1:
        alone["u"] = None
    try:
        tx.update(alone, state, params)
    except RuntimeError as error:
        said = str(error)
    return len(known._messages), said, all(x.isfinite().all() for x in before.values())


def test_messages_are_the_same_whatever_gradient_is_missing(ranks: Ranks) -> None:
    """Those of `init`, of gradients, and of updates. So one that is missing on a rank alone, whose
    part would count as zeros, is an error on all, and not messages of other lengths."""
    for messages, said, finite in ranks(2, of_another_dtype):
        assert messages == 3
        assert "the gradients that are missing is none on rank 0, u on rank 1" in said
        assert "zeros where others have a gradient" in said
        assert finite


def of_another_dtype_at_first(rank: int) -> str:
    """Rank 1 alone has a gradient, in float32, of a parameter in bfloat16."""
    tx = optimizer({}, max_size=8)
    params = placed({n: x.bfloat16() for n, x in tree(0, SOME).items()}, "rows of 2")
    grads: dict[str, Any] = dict(placed(tree(1, SOME), "rows of 2"))
    if rank == 0:
        grads["u"] = None
    try:
        tx.update(grads, tx.init(params), params)
    except RuntimeError as error:
        return str(error)
    return "went on"


def of_another_dtype_later(rank: int, dtype: torch.dtype, together: bool) -> list[str]:
    """Rank 1 has a gradient in it after some in float32, where rank 0 has none; or both have."""
    tx = optimizer({}, max_size=8)
    params = placed(tree(0, SOME), "rows of 2")
    state, said = tx.init(params), []
    for t in range(1, 6):
        grads: dict[str, Any] = dict(placed(tree(t, SOME), "rows of 2"))
        if t > 2 and (together or rank == 1):
            grads["u"] = grads["u"].to(dtype)
        if rank == 0 and not together and t == 3:
            grads["u"] = None
        try:
            state = tx.update(grads, state, params)[1]
            said.append("went on")
        except RuntimeError as error:
            return [*said, str(error)]
    return said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("together", [True, False])
def test_a_gradient_in_another_dtype_than_before(
    ranks: Ranks, dtype: torch.dtype, together: bool
) -> None:
    """Where one rank alone has it, messages would have other lengths than the others expect."""
    for said in ranks(2, of_another_dtype_later, dtype, together):
        assert said[:2] == ["went on"] * 2
        if together:
            assert said[2:] == ["went on"] * 3
        else:
            assert f"of 'u' is torch.float32 on rank 0, {dtype} on rank 1" in said[2]


def test_a_first_gradient_that_is_missing_on_one_rank_and_of_another_dtype(ranks: Ranks) -> None:
    """Messages would have other lengths, and gloo ends the process."""
    for said in ranks(2, of_another_dtype_at_first):
        assert "the dtype of the gradient of 'u'" in said
        assert "torch.bfloat16 on rank 0, torch.float32 on rank 1" in said
