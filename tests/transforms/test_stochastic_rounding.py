"""Rounding at random: its mean is what was rounded, and it is the same wherever an entry lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import funshampoo as fs
from funshampoo.operators.rounding import random_bits, rounded_at_random
from tests.trees import default_dtype

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
N = 2048


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(n: int, seed: int = 0) -> Tensor:
    return random_bits([normal(n, seed=seed)], torch.zeros((), dtype=torch.int32))


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of dtype next to x, below and above, or x twice; from torch's own rounding."""
    nearest = x.to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    below = torch.where(nearest.float() > x, torch.nextafter(nearest, -infinity), nearest).float()
    above = torch.where(nearest.float() < x, torch.nextafter(nearest, infinity), nearest).float()
    return below, above


@HALVES
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 3e4])
def test_it_is_a_neighbour_and_right_in_the_mean(dtype: torch.dtype, size: float) -> None:
    x = normal(N) * size
    x = x[x.abs() < torch.finfo(dtype).max]
    below, above = neighbours(x, dtype)
    ups = torch.zeros_like(x)
    tries = 400
    for seed in range(tries):
        found = rounded_at_random(x, dtype, bits(len(x), seed))
        assert torch.equal(found.to(dtype).float(), found)
        up = found == above
        assert (up | (found == below)).all()
        ups += up & (above > below)
    share = torch.where(above > below, (x - below) / (above - below), 0.0)
    spread = (share * (1 - share) / tries).sqrt()
    assert ((ups / tries - share).abs() <= 5 * spread + 1e-3).all()
    assert abs((ups / tries - share).mean()) <= 4 * spread.mean() / len(x) ** 0.5 + 1e-5


@pytest.mark.parametrize("share", [2**-13.5, 2**-14.5, 1 - 2**-14.5])
@pytest.mark.parametrize("whole", [-6, -1, 0, 5])
def test_below_the_normal_numbers_every_bit_counts(whole: int, share: float) -> None:
    """There a float32 has more bits below float16's step, 2^-24, than above: a binomial number."""
    n = 2**21
    x = torch.full((n,), (whole + share) * 2**-24)
    random = random_bits([x], torch.arange(n, dtype=torch.int32))
    ups = rounded_at_random(x, torch.float16, random).double() * 2**24 - whole
    wanted = (x[0].double() * 2**24 - whole).item()
    assert abs(ups.mean().item() - wanted) < 4.5 * (wanted * (1 - wanted) / n) ** 0.5


@HALVES
def test_the_default_dtype_plays_no_part(dtype: torch.dtype) -> None:
    """Where a model is built in half precision: in float16, most small steps were lost."""
    x = normal(N)
    expected = rounded_at_random(x, dtype, bits(N))
    random = bits(N)
    with default_dtype(dtype):
        assert torch.equal(rounded_at_random(x, dtype, random), expected)


@HALVES
def test_what_the_dtype_has_stays(dtype: torch.dtype) -> None:
    own = (normal(N) * torch.logspace(-7, 4, N)).to(dtype).float()
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).max])
    for x in (own, special):
        found = rounded_at_random(x, dtype, bits(len(x)))
        assert torch.equal(found.nan_to_num(), x.nan_to_num())


def test_every_bit_is_a_fair_coin() -> None:
    """Of counters, of constants with another salt, and of numbers that differ in their last bit."""
    n = 2**14
    salts = torch.arange(n, dtype=torch.int32)
    close = torch.ones(n).view(torch.int32).add(salts).view(torch.float32)
    for found in (
        random_bits([torch.ones(n)], salts),
        random_bits([close], torch.ones((), dtype=torch.int32)),
        random_bits([torch.ones(n), close], torch.ones((), dtype=torch.int32)),
        random_bits([torch.zeros(n), torch.zeros(n)], salts),
    ):
        coins = torch.stack([(found >> i) & 1 for i in range(32)]).double()
        bound = 5 * 0.5 / n**0.5
        assert ((coins.mean(1) - 0.5).abs() < bound).all()
        together = torch.corrcoef(coins) - torch.eye(32)
        assert together.abs().max() < 5 / n**0.5
        after = (coins[:, 1:] == coins[:, :-1]).double().mean(1)
        assert ((after - 0.5).abs() < bound).all()


@pytest.mark.parametrize(("stage", "alike"), [(fs.sign(), 32), (fs.scale(1.0), 1)])
def test_small_steps_arrive(stage: fs.GradientTransformation, alike: int) -> None:
    """250 steps of 4e-5 move weights by 1e-2 in the mean; rounded to nearest they move none.

    alike: about how many entries have the same weight, and with the same update are rounded alike.
    """
    rate, steps = 4e-5, 250
    nearest = fs.chain(stage, fs.scale_by_learning_rate(rate))
    before = torch.linspace(1.1, 1.9, N).bfloat16()
    params = [before.clone(), before.clone()]
    methods = [nearest, fs.chain(nearest, fs.stochastic_rounding())]
    states = [tx.init(p) for tx, p in zip(methods, params)]
    for t in range(steps):
        grads = 1 + 1e-3 * normal(N, seed=t)  # of one sign
        states = [fs.update_in_place(*a) for a in zip(methods, [grads] * 2, states, params)]
    assert torch.equal(params[0], before)
    moved = before.float() - params[1].float()
    # Steps of 2^-7, each with a probability of rate / 2^-7: a binomial number of them.
    spread = (steps * rate * 2**-7) ** 0.5
    assert abs(moved.mean() - steps * rate) < 5 * spread / (N / alike) ** 0.5
    assert moved.std() == pytest.approx(spread, rel=0.2)


def problem() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    shapes = {"a": (6, 5), "b": (7,)}
    params = {name: normal(*s, seed=9).bfloat16() for name, s in shapes.items()}
    grads = [{n: normal(*s, seed=t) * 1e-2 for n, s in shapes.items()} for t in range(4)]
    return params, grads


def trained(tx: fs.GradientTransformation, params: Any, grads: Any) -> Any:
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = fs.apply_updates(params, updates)
    return params


def test_the_same_wherever_an_entry_lies() -> None:
    """A leaf, a part of it, in place: the same bits."""
    tx = fs.chain(fs.scale(-1.0), fs.stochastic_rounding())
    params, grads = problem()
    expected = trained(tx, params, grads)
    assert not torch.equal(expected["a"], trained(fs.scale(-1.0), params, grads)["a"])

    part = trained(tx, {"a": params["a"][2:4]}, [{"a": g["a"][2:4]} for g in grads])
    assert torch.equal(part["a"], expected["a"][2:4])

    state, mine = tx.init(params), {n: p.clone() for n, p in params.items()}
    for g in grads:
        state = fs.update_in_place(tx, g, state, mine)
    assert all(torch.equal(mine[n], expected[n]) for n in params)


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="view(dtype) has no rule there"
)
def test_the_same_in_an_ensemble() -> None:
    tx = fs.chain(fs.scale(-1.0), fs.stochastic_rounding())
    params, grads = problem()
    expected = trained(tx, params, grads)

    def member(p: Tensor, *gs: Tensor) -> Tensor:
        return trained(tx, {"a": p}, [{"a": g} for g in gs])["a"]  # type: ignore[no-any-return]

    rows = torch.func.vmap(member)(params["a"], *[g["a"] for g in grads])
    assert torch.equal(rows, expected["a"])


@pytest.mark.slow
def test_a_graph_rounds_alike() -> None:
    tx = fs.chain(fs.scale(-1.0), fs.stochastic_rounding())
    params, grads = problem()
    update = torch.compile(tx.update, fullgraph=True)
    state, mine = tx.init(params), params
    for g in grads:
        updates, state = update(g, state, mine)
        mine = fs.apply_updates(mine, updates)
    expected = trained(tx, params, grads)
    assert all(torch.equal(mine[n], expected[n]) for n in params)


def test_other_dtypes_and_derivatives() -> None:
    """float32 is let through; in half precision a derivative is that of an unrounded step."""
    tx = fs.stochastic_rounding()
    for dtype in (torch.float32, torch.float64):
        g, p = {"w": normal(5).to(dtype)}, {"w": normal(5, seed=1).to(dtype)}
        assert torch.equal(tx.update(g, tx.init(p), p)[0]["w"], g["w"])
    params = {"w": torch.ones(5, dtype=torch.bfloat16)}
    weights = normal(5, seed=2)

    def number(g: Tensor) -> Tensor:
        return (tx.update({"w": g}, tx.init(params), params)[0]["w"] * weights).sum()

    assert torch.equal(torch.func.grad(number)(normal(5)), weights)


def test_it_stands_outside_of_blocks() -> None:
    params, _ = problem()
    with pytest.raises(ValueError, match="put it behind"):
        fs.blocked(fs.stochastic_rounding()).init(params)


def test_it_is_the_last_stage() -> None:
    params, grads = problem()
    own = fs.chain(fs.scale_by_adam(), fs.stochastic_rounding())
    with pytest.raises(ValueError, match="put stochastic_rounding last"):
        fs.Optimizer([torch.nn.Parameter(params["a"])], own, lr=0.1)
    behind = fs.chain(own, fs.tail_average())
    behind.update(grads[0], behind.init(params), params)
