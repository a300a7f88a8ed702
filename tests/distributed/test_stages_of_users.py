"""Stages of a user's own: any number of ranks, the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import funshampoo as fs
from funshampoo.authoring import stateless, update_leaves
from funshampoo.state import Kept, merged, state_dict
from funshampoo.state.nodes import walk
from tests.distributed.problems import SMALL, Shapes, train, tree
from tests.distributed.ranks import Ranks
from tests.refresh.clients import in_eigenbasis, kl_shampoo
from tests.trees import assert_equal, tensors

STEPS = 15
EVEN = {"w": (20, 12), "kernel": (6, 4, 2), "bias": (10,), "scale": (), "wide": (16, 24)}
ODD = {**SMALL, "wide": (16, 24), "deep": (7, 5, 3)}


def client(name: str, stagger: bool) -> fs.GradientTransformation:
    when = {"every": 3, "start": 4, "stagger": stagger}
    if name == "kl":
        return fs.chain(kl_shampoo(0.9, **when), fs.trace(0.9))
    inner = fs.scale_by_adam(0.9, 0.95)
    return fs.chain(fs.kronecker_statistics(0.9), in_eigenbasis(inner, **when), fs.trace(0.9))


def run(rank: int, name: str, stagger: bool, shared: bool, shapes: Shapes = EVEN) -> Any:
    inner = fs.guarded(fs.chain(client(name, stagger), fs.scale_by_learning_rate(0.01)))
    tx = fs.blocked(fs.sharded(inner, every=3) if shared else inner, max_size=8)
    params, state = train(tx, tree(0, shapes), range(1, STEPS + 1), lambda t: tree(t, shapes))
    rounds = [int(n) for _, x in walk(state) if isinstance(x, Kept) for n in x.rounds]
    return params, state_dict(state), rounds


@pytest.mark.parametrize(
    ("stagger", "shapes"),
    [(False, ODD), pytest.param(True, ODD, marks=pytest.mark.slow), (False, EVEN)],
)
@pytest.mark.parametrize("name", ["soap", "kl"])
def test_a_client_gives_the_bits_of_one_process(
    ranks: Ranks, name: str, stagger: bool, shapes: Shapes
) -> None:
    ((expected, whole, rounds),) = ranks(1, run, name, stagger, False, shapes)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0, shapes))))
    assert min(rounds) >= STEPS // 3 - 3
    for size in (2, 3):
        found = ranks(size, run, name, stagger, True, shapes)
        for got, _, own in found:
            assert_equal(got, expected)
            assert 0 < len(own) < len(rounds)  # no rank has all of it
        assert sorted(n for _, _, own in found for n in own) == sorted(rounds)
        together = merged([saved for _, saved, _ in found])
        assert together.keys() == whole.keys()
        different = [n for n, x in whole.items() if not torch.equal(together[n], x)]
        assert not different


def run_with_a_hessian(rank: int, around: str, shared: bool) -> Any:
    """A stage that reads a tree of the caller's own, see `core.context.with_cut`."""

    def clipped(updates: Any, *, hessian: Any) -> Any:
        return update_leaves(lambda u, h: ((u / h).clamp(-1, 1),), updates, (), (hessian,))[0]

    inner = fs.chain(fs.trace(0.9), stateless(clipped), fs.scale(-0.01))
    tx = fs.sharded(inner) if shared else inner
    tx = fs.blocked(tx, max_size=8) if around == "blocked" else tx
    params, state = tree(0, ODD), tx.init(tree(0, ODD))
    for t in range(1, 4):
        hessian = {name: x.abs() + 0.1 for name, x in tree(100 + t, ODD).items()}
        updates, state = tx.update(tree(t, ODD), state, params, hessian=hessian)
        params = fs.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("around", ["blocked", "leaves"])
def test_a_tree_of_the_callers_own_reaches_its_owner(ranks: Ranks, around: str) -> None:
    expected = run_with_a_hessian(0, around, False)
    for found in ranks(2, run_with_a_hessian, around, True):
        assert_equal(found, expected)


def run_elementwise(rank: int, placements: dict[str, Any] | None) -> Any:
    """A hessian lies like its parameter, in a chain and on its own, or elsewhere."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def whole(n: int) -> Any:
        return {"w": tree(n, ODD)["wide"], "b": tree(n, ODD)["deep"]}

    def placed(found: Any, where: str) -> Any:
        if placements is None:
            return found
        return {k: distribute_tensor(x, mesh, placements[where]) for k, x in found.items()}

    def over(updates: Any, *, hessian: Any) -> Any:
        return update_leaves(lambda u, h: (u / h,), updates, (), (hessian,))[0]

    own = stateless(over, elementwise=True)
    found = []
    for tx in (fs.chain(own, fs.scale_by_adam(), fs.scale(-0.01)), own):
        params = placed(whole(0), "params")
        hessian = placed({k: x.abs() + 0.1 for k, x in whole(1).items()}, "hessian")
        grads, state = placed(whole(2), "params"), tx.init(params)
        updates, state = tx.update(grads, state, params, hessian=hessian)
        tx_params = {k: x.clone() for k, x in params.items()}
        fs.update_in_place(tx, grads, state, tx_params, hessian=hessian)
        found += [*updates.values(), *tx_params.values()]
    return [x if placements is None else x.full_tensor() for x in found]


@pytest.mark.parametrize("hessian", [Shard(0), Shard(1), Replicate()])
def test_a_tree_of_the_callers_own_in_parts(ranks: Ranks, hessian: Any) -> None:
    """An elementwise stage got a rank's part of the parameters, and all of the caller's DTensor."""
    (expected,) = ranks(1, run_elementwise, None)
    for found in ranks(2, run_elementwise, {"params": [Shard(0)], "hessian": [hessian]}):
        assert_equal(found, expected)
