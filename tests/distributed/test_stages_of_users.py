"""Stages of a user's own that refresh, SOAP and KL-Shampoo: any number of ranks, the same bits.

Where the sides of blocks are even. On odd ones torch's own products and decompositions, which these
clients call, round by where in a stack a matrix begins (`linalg.products`): there it is the same up
to that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state import Kept, merged, state_dict
from funshampoo.state.nodes import walk
from tests.distributed.problems import SMALL, Shapes, train, tree
from tests.distributed.ranks import Ranks
from tests.refresh.clients import in_eigenbasis, kl_shampoo
from tests.trees import assert_close, assert_equal, tensors

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


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("name", ["soap", "kl"])
def test_a_client_gives_the_bits_of_one_process(ranks: Ranks, name: str, stagger: bool) -> None:
    ((expected, whole, rounds),) = ranks(1, run, name, stagger, False)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(tree(0, EVEN))))
    assert min(rounds) >= STEPS // 3 - 3
    for size in (2, 3):
        found = ranks(size, run, name, stagger, True)
        for got, _, own in found:
            assert_equal(got, expected)
            assert 0 < len(own) < len(rounds)  # no rank has all of it
        assert sorted(n for _, _, own in found for n in own) == sorted(rounds)
        together = merged([saved for _, saved, _ in found])
        assert together.keys() == whole.keys()
        different = [n for n, x in whole.items() if not torch.equal(together[n], x)]
        assert not different


@pytest.mark.parametrize("name", ["soap", "kl"])
def test_odd_sides_are_the_same_up_to_rounding(ranks: Ranks, name: str) -> None:
    ((expected, _, rounds),) = ranks(1, run, name, False, False, ODD)
    found = ranks(2, run, name, False, True, ODD)
    assert_equal(found[0][0], found[1][0])  # whoever computed it, all have it
    assert_close(found[0][0], expected, 1e-3)
    assert sorted(n for _, _, own in found for n in own) == sorted(rounds)
