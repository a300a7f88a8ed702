"""Schedules, against torch.optim.lr_scheduler and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import vmap

from funshampoo import schedules

ALL = {
    "constant": schedules.constant(0.3),
    "linear": schedules.linear(0.0, 1.0, 5, begin=2),
    "polynomial": schedules.polynomial(1.0, 0.1, 7, power=2.0),
    "cosine": schedules.cosine(0.5, 9, end=0.1),
    "warmup_cosine": schedules.warmup_cosine(1.0, 3, 10),
    "join": schedules.join([schedules.constant(1.0), schedules.linear(1.0, 0.0, 4)], [3]),
}


@pytest.mark.parametrize("name", ALL)
def test_int_tensor_and_batched_counts_agree_in_float32(name: str) -> None:
    schedule = ALL[name]
    counts = torch.arange(15)
    batched = vmap(schedule)(counts)
    assert batched.dtype == torch.float32
    for count in range(15):
        value = schedule(torch.tensor(count))
        assert value.ndim == 0
        assert value.dtype == torch.float32
        assert value == schedule(count) == batched[count]  # type: ignore[arg-type]


def test_values_by_hand() -> None:
    def values(name: str, counts: list[int]) -> list[float]:
        return [float(ALL[name](torch.tensor(c))) for c in counts]

    assert values("constant", [0, 99]) == pytest.approx([0.3, 0.3])
    assert values("linear", [0, 2, 3, 7, 99]) == pytest.approx([0, 0, 0.2, 1, 1])
    assert values("polynomial", [0, 7, 99]) == pytest.approx([1.0, 0.1, 0.1])
    assert values("polynomial", [1]) == pytest.approx([0.1 + 0.9 * (6 / 7) ** 2])
    assert values("cosine", [0, 9]) == pytest.approx([0.5, 0.1])
    assert values("cosine", [3]) == pytest.approx([0.1 + 0.4 * (1 + math.cos(math.pi / 3)) / 2])
    assert values("warmup_cosine", [0, 3, 10]) == pytest.approx([0, 1, 0])
    assert values("join", [0, 2, 3, 5, 7]) == pytest.approx([1, 1, 1, 0.5, 0])


def test_counts_beyond_float32_are_told_apart() -> None:
    schedule = schedules.linear(0.0, 1.0, 3, begin=2**25)
    assert [round(float(schedule(torch.tensor(2**25 + i))), 4) for i in range(4)] == [
        0.0,
        0.3333,
        0.6667,
        1.0,
    ]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        schedules.linear(0.0, 1.0, 0)
    with pytest.raises(ValueError, match="2 schedules need 1 boundaries, got 2"):
        schedules.join([ALL["cosine"], ALL["linear"]], [1, 2])
    with pytest.raises(ValueError, match="must increase"):
        schedules.join([ALL["cosine"]] * 3, [2, 2])
    assert float(schedules.warmup_cosine(1.0, 0, 4)(torch.tensor(0))) == 1.0
    with pytest.raises(ValueError, match="steps is 3; it must be at least 4"):
        schedules.warmup_cosine(1.0, 3, 3)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert schedules.cosine(numpy.float32(0.5), 10)(torch.tensor(0)) == 0.5
    assert schedules.constant(numpy.int64(1))(torch.tensor(3)) == 1.0
