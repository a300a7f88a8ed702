"""Many small sharded parameters: little Python for each, and elementwise stages on their parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import funshampoo as fs
from funshampoo.core.tree import flatten
from tests.distributed.problems import Shapes
from tests.distributed.problems import tree as numbers
from tests.distributed.ranks import Ranks
from tests.releases import wrong_before
from tests.sooner import these
from tests.table import CASES, Case
from tests.test_calls import calls

METHODS: dict[str, Any] = {"shampoo": fs.shampoo, "adamw": fs.adamw, "muon": fs.muon}

MOST = {"shampoo": 25, "adamw": 65, "muon": 110}
"""Calls of Python for another parameter, of which torch's dispatch takes 30 for one operator."""

FEW, MANY = 4, 16


def small(copies: int) -> Shapes:
    shapes: Shapes = {"w": (12, 10), "g": (12,), "b": (5,)}
    return {f"{name}{i}": shape for i in range(copies) for name, shape in shapes.items()}


def rows(values: dict[str, Tensor]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in values.items()}


def step_of(method: str, wrapped: bool, shapes: Shapes) -> Callable[[], Any]:
    params, grads = rows(numbers(0, shapes)), rows(numbers(1, shapes))
    if wrapped:
        named = {n: torch.nn.Parameter(p) for n, p in params.items()}
        for n, p in named.items():
            p.grad = grads[n]
        return fs.Optimizer(list(named.items()), METHODS[method], lr=0.01).step
    tx = METHODS[method](0.01)
    states = [tx.init(params)]

    def step() -> None:
        states[0] = fs.update_in_place(tx, grads, states[0], params)

    return step


def counted(rank: int, method: str, wrapped: bool) -> list[int]:
    """Calls of a plain step of few parameters, and of one of many of the same shapes."""
    found = []
    for copies in (FEW, MANY):
        step = step_of(method, wrapped, small(copies))
        for _ in range(11):  # after the refreshes at 1 and 10
            step()
        found.append(calls(step))
    return found


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else looks at the calls")
@pytest.mark.parametrize("wrapped", [False, True], ids=["function", "wrapper"])
@pytest.mark.parametrize("method", these([*METHODS], sooner=["shampoo"]))
def test_calls_for_another_parameter(ranks: Ranks, method: str, wrapped: bool) -> None:
    wrong_before("2.10", "a sharded parameter costs more calls", wrapped and method != "muon")
    for few, many in ranks(2, counted, method, wrapped):
        assert (many - few) / (len(small(MANY)) - len(small(FEW))) <= MOST[method]


# What is elementwise says so, and has the numbers of whole parameters on parts of them.

SHAPES: Shapes = {"w": (7, 4), "u": (4, 3), "b": (5,), "one": (1,), "scalar": ()}
BY_NAME = ("masked", "add_decayed_weights:masked")  # of another tree
ELEMENTWISE = [c for c in CASES if c.make().elementwise and c.name not in BY_NAME]
ELEMENTWISE += [c for c in CASES if c.name == "guarded:by_leaf"]  # what is inside of it is


def placements(shape: tuple[int, ...], columns: bool) -> list[Any]:
    if not shape:
        return [Replicate()]
    return [Shard(len(shape) - 1 if columns else 0)]


def placed(values: dict[str, Tensor | None]) -> dict[str, Any]:
    """Rows, but of `u` columns: some ranks have nothing of the smallest."""
    mesh = init_device_mesh("cpu", (2,))
    return {
        n: None if x is None else distribute_tensor(x, mesh, placements(tuple(x.shape), n == "u"))
        for n, x in values.items()
    }


def gradients(t: int) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = dict(numbers(t, SHAPES))
    if t == 2:
        found["w"] = None
    if t == 3:
        found["u"] = torch.full(SHAPES["u"], float("nan"))
    return found


def trained(case: Case, put: Any, way: str) -> tuple[Any, Any, Any]:
    """(updates of the last step, state, parameters) after some steps."""
    half = case.name == "stochastic_rounding"  # which does nothing to others
    dtype = torch.bfloat16 if half else torch.float32
    tx, params = case.make(), put({n: x.to(dtype) for n, x in numbers(0, SHAPES).items()})
    updates, state = None, tx.init(params)
    for t in range(1, 5):
        if way == "in place":
            state = fs.update_in_place(tx, put(gradients(t)), state, params)
        else:
            donate = way == "donated"
            updates, state = tx.update(put(gradients(t)), state, params, donate=donate)
            params = fs.apply_updates(params, updates)
    return updates, state, params


def compared(rank: int, names: list[str]) -> list[str]:
    """What differs between parts and whole."""
    wrong = []
    for case in [case for case in CASES if case.name in names]:
        for way in ("pure", "donated", "in place"):
            expected, spec = flatten(trained(case, dict, way))
            found, other = flatten(trained(case, placed, way))
            for i, (a, b) in enumerate(zip(expected, found)):
                if a is not None and not torch.equal(a.nan_to_num(7.0), full(b).nan_to_num(7.0)):
                    wrong.append(f"{case.name} {way} {i}")
            if spec != other or not any(isinstance(x, DTensor) for x in found):
                wrong.append(f"{case.name} {way}: structure")
    return wrong


@pytest.mark.slow  # every case of the table, on ranks
def test_parts_have_the_numbers_of_the_whole(ranks: Ranks) -> None:
    names = [case.name for case in ELEMENTWISE]
    assert {"scale_by_adam", "trace", "ema", "scale_by_learning_rate", "adamw"} <= set(names)
    for wrong in ranks(2, compared, names):
        assert wrong == []


def on_shapes(rank: int) -> tuple[Any, Any]:
    """Masks: a function that asks for shapes sees those of whole parameters."""

    def long(tree: Any) -> Any:
        return {n: len(p) > 6 for n, p in tree.items()}

    shapes: Shapes = {"long": (7, 2), "short": (6, 2)}
    found = []
    for mask in (long, {"long": True, "short": False}):
        tx = fs.adamw(0.1, weight_decay=0.5, mask=mask)
        for put in (dict, rows):
            params, grads = put(numbers(0, shapes)), put(numbers(1, shapes))
            updates, _ = tx.update(grads, tx.init(params), params)
            found.append([full(x) for x in updates.values()])
    return found[0], found[1:]


def full(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def test_masks_see_whole_shapes(ranks: Ranks) -> None:
    for expected, others in ranks(2, on_shapes):
        for found in others:
            assert all(map(torch.equal, expected, found))


def elsewhere(rank: int) -> list[bool]:
    """Partial sums that nobody adds up, and a state that lies otherwise than its parameters."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.arange(16.0).view(4, 4) - 6
    halves = DTensor.from_local(x / 2 + (rank or -1), mesh, [Partial()])
    clip, adam = fs.chain(fs.clip(1.0)), fs.chain(fs.scale_by_adam())
    clipped, _ = clip.update({"w": halves}, clip.init({"w": halves}))
    expected, _ = adam.update({"w": x}, adam.init({"w": x}))
    params, grads = [{"w": distribute_tensor(x, mesh, [Shard(0)])} for _ in range(2)]
    other = adam.init({"w": distribute_tensor(x, mesh, [Shard(1)])})
    moved, _ = adam.update(grads, other, params)
    return [
        torch.equal(full(clipped["w"]), x.clamp(-1, 1)),
        torch.equal(full(moved["w"]), expected["w"]),
    ]


def test_what_lies_otherwise_goes_through_torch(ranks: Ranks) -> None:
    wrong_before("2.9", "lerp of such DTensors uses the weight of the previous call")
    assert ranks(2, elsewhere) == [[True, True]] * 2


BEHIND = {
    "decay": fs.add_decayed_weights(0.5),
    "rounding": fs.stochastic_rounding(),  # of which a number of steps is the seed
}


def behind_blocks(rank: int) -> list[str]:
    """What differs where stages behind blocks meet a parameter without a gradient.

    The last is one of two elementwise stages in a row, and knows that none stands behind it.
    """
    wrong = []
    for name, stage in BEHIND.items():
        found = []
        for put, inner in ((dict, fs.trace(0.9)), (rows, fs.sharded(fs.trace(0.9)))):
            tx = fs.chain(fs.blocked(inner, 4), fs.scale(-1e-3), stage)
            params = put(
                {n: x.bfloat16() for n, x in numbers(0, {"a": (7, 2), "b": (6, 2)}).items()}
            )
            state = tx.init(params)
            for t in range(1, 5):
                grads = put(numbers(t, {"a": (7, 2), "b": (6, 2)}))
                updates, state = tx.update(grads | ({"a": None} if t == 2 else {}), state, params)
                if t == 2 and updates["a"] is not None:
                    wrong.append(f"{name}: an update")
                params = fs.apply_updates(params, updates)
            found.append([full(x) for x in params.values()])
        wrong += [name for a, b in zip(*found) if not torch.equal(a, b)]
    return wrong


def test_stages_behind_blocks_leave_alone_what_has_no_gradient(ranks: Ranks) -> None:
    assert ranks(2, behind_blocks) == [[], []]
