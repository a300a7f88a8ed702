"""Averages of weights against their equations written out, and the weights to evaluate with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from tests.trees import assert_close, assert_equal, gradients, problem, tensors

D = torch.float64
STEPS = 7


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


GRADS = [randn(3, 4, seed=10 + t) for t in range(STEPS)]


def trained(tx: fs.GradientTransformation, w: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """The parameters after every step, and those to evaluate with."""
    state, params, path, evaluated = tx.init({"w": w}), {"w": w}, [], []
    for g in GRADS:
        updates, state = tx.update({"w": g}, state, params)
        params = fs.apply_updates(params, updates)
        path.append(params["w"])
        evaluated.append(fs.evaluation_parameters(state, params)["w"])
    return path, evaluated


def rate(count: Any) -> torch.Tensor:
    return torch.tensor([0.0, 0.1, 0.3, 0.2, 0.2, 0.1, 0.05], dtype=D)[count]


def test_schedule_free() -> None:
    w = randn(3, 4)
    path, evaluated = trained(fs.schedule_free(rate, 0.8, r=0.5, weight_lr_power=2.0), w)
    x, z, total, largest = w, w, 0.0, 0.0
    for t, g in enumerate(GRADS):
        alpha = float(rate(t))
        z = z - alpha * g
        largest = max(largest, alpha)
        weight = (t + 1) ** 0.5 * largest**2
        total += weight
        c = weight / total if total else 0.0
        x = (1 - c) * x + c * z
        assert torch.allclose(path[t], 0.8 * x + 0.2 * z, rtol=1e-12)
        assert torch.allclose(evaluated[t], x, rtol=1e-12)
    assert torch.equal(path[0], w)  # a rate of 0 is no 0/0


def test_with_equal_weights_it_is_the_average_of_the_fast_weights() -> None:
    w = randn(3, 4)
    _, evaluated = trained(fs.schedule_free(0.1, weight_lr_power=0.0), w)
    fast = [w - 0.1 * sum(GRADS[: t + 1]) for t in range(STEPS)]
    assert torch.allclose(evaluated[-1], torch.stack(fast).mean(0), rtol=1e-12)


def test_primal_average() -> None:
    w = randn(3, 4)
    path, evaluated = trained(fs.primal_average(rate, average=0.7, interpolation=0.9), w)
    x = z = w
    for t, g in enumerate(GRADS):
        z = z - rate(t) * g
        x = 0.7 * x + 0.3 * z
        assert torch.allclose(path[t], 0.9 * x + 0.1 * z, rtol=1e-12)
        assert torch.allclose(evaluated[t], x, rtol=1e-12)


def test_ema_nesterov() -> None:
    def look_ahead(count: Any) -> torch.Tensor:
        return torch.where((count >= 2) & (count < 5), 0.3 * count, 0.0)

    w = y = randn(3, 4)
    tx = fs.chain(fs.scale(-0.1), fs.ema_nesterov(look_ahead, 0.8))
    path, evaluated = trained(tx, w)
    B = torch.zeros_like(w)
    for t, g in enumerate(GRADS):
        new = y - 0.1 * g
        B, w = 0.8 * B + 0.2 * (new - w), new
        done = t + 1
        y = w + (0.3 * done if 2 <= done < 5 else 0.0) * B
        assert torch.allclose(path[t], y, rtol=1e-12)
        assert torch.allclose(evaluated[t], w, rtol=1e-12)


@pytest.mark.parametrize("beta", [None, 0.6])
@pytest.mark.parametrize("start", [1, 3])
def test_tail_average(start: int, beta: float | None) -> None:
    w = randn(3, 4)
    path, evaluated = trained(fs.chain(fs.scale(-0.1), fs.tail_average(start, beta)), w)
    plain = [w - 0.1 * sum(GRADS[: t + 1]) for t in range(STEPS)]
    for t in range(STEPS):
        tail = plain[start - 1 : t + 1]
        shares = [1.0 if beta is None else beta ** (len(tail) - 1 - i) for i in range(len(tail))]
        average = sum(s * p for s, p in zip(shares, tail)) / sum(shares) if tail else plain[t]
        assert torch.allclose(path[t], plain[t], rtol=1e-12)
        assert torch.allclose(evaluated[t], average, rtol=1e-12)


AVERAGING = {
    "schedule_free": lambda: fs.schedule_free(0.1),
    "primal_average": lambda: fs.primal_average(0.1, average=0.7, interpolation=0.9),
    "ema_nesterov": lambda: fs.chain(fs.scale(-0.1), fs.ema_nesterov(0.5)),
    "tail_average": lambda: fs.chain(fs.scale(-0.1), fs.tail_average(2)),
}


def after(tx: fs.GradientTransformation) -> tuple[Any, Any]:
    params, state = problem(), tx.init(problem())
    for g in gradients(4):
        updates, state = tx.update(g, state, params)
        params = fs.apply_updates(params, updates)
    return params, fs.evaluation_parameters(state, params)


@pytest.mark.parametrize("name", AVERAGING)
def test_in_blocks_it_evaluates_with_the_same_weights(name: str) -> None:
    make = AVERAGING[name]
    params, evaluated = after(make())
    assert max(float((a - b).abs().max()) for a, b in zip(tensors(params), tensors(evaluated))) > 0
    blocks, in_blocks = after(fs.blocked(make(), 2, with_params=True))
    assert_close(blocks, params, 1e-13)
    assert_close(in_blocks, evaluated, 1e-13)


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("inside", [False, True], ids=["plain", "blocked"])
def test_in_a_partition_the_others_are_evaluated_as_they_are(name: str, inside: bool) -> None:
    make = AVERAGING[name]
    part = fs.blocked(make(), 2, with_params=True) if inside else make()
    params, evaluated = after(
        fs.partition({"a": part, "b": fs.sgd(0.1)}, {"w": "a", "layers": "b"})
    )
    assert_close(evaluated["w"], after(make())[1]["w"], 1e-13)
    assert_equal(evaluated["layers"], params["layers"])


def test_the_last_of_several_averages_counts() -> None:
    w = randn(3, 4)
    both = fs.chain(fs.schedule_free(0.1), fs.tail_average())
    _, evaluated = trained(both, w)
    path, _ = trained(fs.schedule_free(0.1), w)
    assert torch.allclose(evaluated[-1], torch.stack(path).mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_master_weights_for_half_precision(dtype: torch.dtype, in_place: bool) -> None:
    """Steps that vanish beside a weight of 1 add up to those of float32, rounded once."""
    tx = fs.chain(
        fs.adamw(1e-5, weight_decay=0.0),
        fs.scale(-1.0),
        fs.primal_average(1.0, average=0.0, interpolation=0.0),
    )
    params, wide = {"w": torch.ones(5, dtype=dtype)}, {"w": torch.ones(5)}
    state, plain = tx.init(params), fs.adamw(1e-5, weight_decay=0.0)
    plain_state = plain.init(wide)
    for seed in range(1000):
        g = {"w": 1 + 0.1 * randn(5, seed=seed).to(dtype)}
        if in_place:
            state = fs.update_in_place(tx, g, state, params)
        else:
            updates, state = tx.update(g, state, params)
            params = fs.apply_updates(params, updates)
        wide_g = {"w": g["w"].float()}
        plain_state = fs.update_in_place(plain, wide_g, plain_state, wide)
    assert (wide["w"] < 0.995).all()
    error = (params["w"].float() - wide["w"]).abs().max()
    assert error <= torch.finfo(dtype).eps / 4 + 1e-5  # below 1 half a unit is eps / 4


def test_half_precision_loses_nothing_of_the_average() -> None:
    """Steps of 1e-3 vanish beside weights of 1 in bfloat16, and not in the average."""
    params = {"w": torch.ones(5, dtype=torch.bfloat16)}
    tx = fs.schedule_free(1e-3)
    state = tx.init(params)
    for _ in range(100):
        updates, state = tx.update({"w": torch.ones(5, dtype=torch.bfloat16)}, state, params)
        params = fs.apply_updates(params, updates)
    assert torch.allclose(state.evaluated["w"], torch.full((5,), 1 - 1e-3 * 50.5), rtol=1e-5)
    assert fs.evaluation_parameters(state, params)["w"].dtype == torch.bfloat16


def test_errors_of_evaluation() -> None:
    params = {"w": torch.ones(2)}
    tx = fs.sgd(0.1)
    with pytest.raises(ValueError, match="no stage of this state averages: put schedule_free"):
        fs.evaluation_parameters(tx.init(params), params)
    state = fs.schedule_free(0.1).init(params)
    with pytest.raises(ValueError, match="another tree"):
        fs.evaluation_parameters(state, {"v": params["w"], "w": params["w"]})
    with pytest.raises(ValueError, match=r"'w' has the shape \(3,\), and its average \(2,\)"):
        fs.evaluation_parameters(state, {"w": torch.ones(3)})
    state = fs.blocked(fs.schedule_free(0.1), with_params=True).init(params)
    with pytest.raises(ValueError, match="not those that the state was made for"):
        fs.evaluation_parameters(state, {"v": params["w"]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.schedule_free(-1.0), "learning_rate is -1.0"),
        (lambda: fs.schedule_free(0.1, 1.5), "beta is 1.5"),
        (lambda: fs.schedule_free(0.1, r=-1.0), "r is -1.0"),
        (lambda: fs.schedule_free(0.1, weight_lr_power=-1.0), "weight_lr_power is -1.0"),
        (lambda: fs.primal_average(0.1, average=1.0, interpolation=0.5), "average is 1.0"),
        (lambda: fs.primal_average(0.1, average=0.5, interpolation=2.0), "interpolation is 2.0"),
        (lambda: fs.ema_nesterov(-0.1), "look_ahead is -0.1"),
        (lambda: fs.ema_nesterov(0.1, 1.0), "beta is 1.0"),
        (lambda: fs.tail_average(0), "start is 0"),
        (lambda: fs.tail_average(beta=1.0), "beta is 1.0"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", AVERAGING)
def test_missing_parameters_are_named(name: str) -> None:
    u = {"w": torch.ones(2, 2)}
    tx = AVERAGING[name]()
    with pytest.raises(ValueError, match=f"{name} needs the parameters: pass params to update"):
        tx.update(u, tx.init(u))
