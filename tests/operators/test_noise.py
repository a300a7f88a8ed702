"""Random numbers that are a hash: normal, independent, and the same anywhere."""

from __future__ import annotations

import torch
from torch.func import vmap

from funshampoo.authoring import random_normal
from tests.trees import default_dtype


def test_they_are_normal_and_independent_of_each_other() -> None:
    x = random_normal((64, 64), torch.arange(64)).flatten(1)
    n = x.numel()
    for power, expected, variance in ((1, 0.0, 1), (2, 1.0, 2), (3, 0.0, 15), (4, 3.0, 96)):
        assert abs((x**power).mean() - expected) < 5 * (variance / n) ** 0.5
    assert torch.corrcoef(x).fill_diagonal_(0.0).abs().max() < 6 / x.shape[1] ** 0.5  # seeds
    for lag in (1, 64, 2048):
        assert abs((x[:, :-lag] * x[:, lag:]).mean()) < 5 / n**0.5


def test_a_row_depends_on_its_seed_alone() -> None:
    seeds = torch.tensor([7, 8, 2**40 + 7])
    rows = random_normal((3, 5), seeds, torch.float64)
    assert rows.shape == (3, 3, 5)
    assert rows.dtype == torch.float64
    for i, seed in enumerate(seeds):
        assert torch.equal(rows[i], random_normal((3, 5), seed, torch.float64))
    assert torch.equal(rows, vmap(lambda seed: random_normal((3, 5), seed, torch.float64))(seeds))
    assert random_normal((), seeds[0]).shape == ()
    assert random_normal((0, 2), seeds[0]).shape == (0, 2)


def test_the_default_dtype_plays_no_part() -> None:
    """float16 ends below the integers that the numbers are made of: they were NaN."""
    expected = random_normal((64,), torch.tensor(3))
    with default_dtype(torch.float16):
        assert torch.equal(random_normal((64,), torch.tensor(3)), expected)
