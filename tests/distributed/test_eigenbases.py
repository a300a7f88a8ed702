"""Other methods than Shampoo on several ranks: the bits of one process, odd sides or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import funshampoo as fs
from funshampoo.state import merged, state_dict
from tests.distributed.problems import train, tree
from tests.distributed.ranks import Ranks
from tests.sooner import these
from tests.trees import assert_equal

METHODS: dict[str, Callable[..., fs.GradientTransformation]] = {
    "soap": lambda **options: fs.soap(0.01, every=3, max_size=16, **options),
    "soap_staggered": lambda **options: fs.soap(
        0.01, every=3, max_size=16, stagger=True, vectors="blocks", **options
    ),
    "kl_shampoo": lambda **options: fs.kl_shampoo(
        0.01, every=3, max_size=16, stagger=True, **options
    ),
    "kl_soap": lambda **options: fs.kl_soap(
        0.01, every=3, max_size=16, vectors="blocks", tile=600, **options
    ),
    "eigenvalue_shampoo": lambda **options: fs.eigenvalue_shampoo(
        0.01, epsilon=1e-3, every=3, start=3, max_size=16, **options
    ),
    "soap_tiled": lambda **options: fs.soap(0.01, every=3, max_size=16, tile=600, **options),
}


def gradient(t: int) -> Any:
    """One parameter has none at first, another one now and then."""
    grads: dict[str, Any] = dict(tree(100 + t))
    if t < 3:
        grads["conv"] = None
    if t % 4 == 0:
        grads["even"] = None
    if t == 5:
        grads["head"] = grads["head"] * float("nan")
    return grads


def trained(rank: int, name: str, sharding: bool) -> Any:
    options = {"distribute": fs.sharded} if sharding else {}
    params, state = train(METHODS[name](**options), tree(0), range(1, 10), gradient)
    return params, {k: v.clone() for k, v in state_dict(state).items() if "part" not in k}


@pytest.mark.parametrize("name", these([*METHODS], sooner=["soap_staggered", "kl_soap"]))
def test_any_number_of_ranks_the_same_bits(ranks: Ranks, name: str) -> None:
    expected, state = trained(0, name, False)
    assert all((expected[k] - x).abs().max() > 0 for k, x in tree(0).items())
    for size in (1, 2, 3) if name == "soap" else (3,):
        found = ranks(size, trained, name, True)
        for params, _ in found:
            assert_equal(params, expected)
        blocks = {k for k in state if "/block_" in k}
        together: dict[str, Any] = {}
        for _, part in found:
            together |= part
        assert_equal({k: together[k] for k in blocks}, {k: state[k] for k in blocks})


def resumed(rank: int, name: str, sharding: bool, saved: Any) -> Any:
    options = {"distribute": fs.sharded} if sharding else {}
    tx = METHODS[name](**options)
    state = fs.state.load_state_dict(tx.init(saved[0]), saved[1]).state
    return train(tx, saved[0], range(6, 10), gradient, state)[0]


def first_half(rank: int, name: str) -> Any:
    params, state = train(METHODS[name](distribute=fs.sharded), tree(0), range(1, 6), gradient)
    return params, {k: v.clone() for k, v in state_dict(state).items()}


def test_a_checkpoint_of_two_ranks_resumes_on_three(ranks: Ranks) -> None:
    expected, _ = trained(0, "soap_staggered", False)
    halves = ranks(2, first_half, "soap_staggered")
    saved = halves[0][0], merged([part for _, part in halves])
    for found in ranks(3, resumed, "soap_staggered", True, saved):
        assert_equal(found, expected)
