"""An operation of leaves with a number each: in a row or one by one, the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.operators import by_number as module
from funshampoo.operators.by_number import _in_a_row, by_number
from funshampoo.operators.columns import quotient, zeroed
from tests.trees import assert_equal, clone

SHAPES = [(3,), (), (2, 5), (1,), (7, 1, 2), (64,)]


def leaves(seed: int = 0) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make) for shape in SHAPES]


def all_in_a_row(xs: Any, numbers: Any) -> list[list[int]]:
    """On a CPU too; not those with a number a block."""
    single = all([n.ndim == 0 for column in numbers for n in column])
    return [list(range(len(xs)))] if single else []


def test_a_quotient_has_the_bits_of_the_leaves() -> None:
    xs, numbers = leaves(), [torch.tensor(0.1 + i) for i in range(len(SHAPES))]
    expected = [x / n for x, n in zip(xs, numbers)]
    assert_equal(_in_a_row(torch.div, xs, [numbers]), expected)
    assert_equal(quotient(xs, numbers), expected)
    # Two numbers of a leaf keep their order.
    found = _in_a_row(lambda x, n, m: x * n - m, xs, [numbers, numbers[::-1]])
    assert_equal(found, [x * n - m for x, n, m in zip(xs, numbers, numbers[::-1])])


def test_zeros_are_exact_whatever_stands_there() -> None:
    xs = leaves()
    for x, bad in zip(xs, [math.nan, math.inf, -math.inf, 3e38, math.nan, 1.0]):
        x.view(-1)[-1] = bad
    masks = [torch.tensor(i % 2 == 0) for i in range(len(xs))]
    expected = [torch.zeros_like(x) if mask else x for x, mask in zip(xs, masks)]
    for found in (_in_a_row(fs.operators.leaf_ops.zeroed, xs, [masks]), zeroed(xs, masks)):
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        assert not any([x.signbit().any() for x, mask in zip(found, masks) if mask])


def test_what_is_put_in_a_row_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small leaves of one dtype; a large one, an empty one and one value a block by themselves."""
    shapes = [*SHAPES, (module.SMALL + 1,), (0, 3)]
    xs = [torch.empty(shape, device="meta") for shape in shapes]
    numbers = [torch.empty((), device="meta") for _ in xs]
    assert module._rows(xs, [numbers]) == [list(range(len(SHAPES)))]
    assert module._rows(xs[:3], [numbers[:3]]) == []
    assert module._rows(xs, [[x[..., None] for x in numbers]]) == []
    halves = [x.half() if i % 2 else x for i, x in enumerate([*xs, *xs])]
    assert sorted(map(len, module._rows(halves, [[*numbers, *numbers]]))) == [6, 6]
    ones = [torch.tensor(1.0)] * len(SHAPES)
    assert module._rows(leaves(), [ones]) == []  # a CPU has no launches
    found = by_number(torch.div, xs, [numbers], lambda a, b: [x / y for x, y in zip(a, b)])
    assert [x.shape for x in found] == [x.shape for x in xs]


@pytest.mark.parametrize("by_leaf", [True, False])
def test_a_trajectory_by_rows_is_that_of_the_leaves(
    monkeypatch: pytest.MonkeyPatch, by_leaf: bool
) -> None:
    """With gradients that are not finite, too large, or missing."""

    def trained() -> Any:
        params = {f"b{i}": x for i, x in enumerate(leaves())}
        tx = fs.guarded(fs.adamw(0.1), by_leaf=by_leaf)
        state = tx.init(params)
        for t in range(1, 6):
            grads: dict[str, Any] = {f"b{i}": x for i, x in enumerate(leaves(t))}
            if t > 1:
                grads["b2"].view(-1)[t] = [math.nan, math.inf, 1e30, 1.0][t - 2]
            grads["b4"] = None if t == 4 else grads["b4"]
            state = fs.update_in_place(tx, grads, state, params)
        return clone((params, state))

    expected = trained()
    rows: list[int] = []

    def all_rows(xs: Any, numbers: Any) -> list[list[int]]:
        rows.append(len(xs))
        return all_in_a_row(xs, numbers)

    monkeypatch.setattr(module, "_rows", all_rows)
    assert_equal(trained(), expected)
    assert max(rows) == len(SHAPES)
    assert min(rows) == len(SHAPES) - 1
    assert expected[1].held["b2"].item() == 3


@pytest.mark.gpu
def test_rows_have_the_bits_of_the_leaves_on_a_gpu() -> None:
    xs = [x.cuda() for x in leaves()]
    numbers = [torch.tensor(0.1 + i, device="cuda") for i in range(len(xs))]
    xs[2][0, 1] = math.nan
    assert module._rows(xs, [numbers]) == [list(range(len(xs)))]
    for x, y in zip(quotient(xs, numbers), [x / n for x, n in zip(xs, numbers)]):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    found = zeroed(xs, [n > 2 for n in numbers])
    assert [bool((x == 0).all()) for x in found] == [bool(n > 2) for n in numbers]
