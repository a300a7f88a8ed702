"""Stages that reshape a direction, against their equations written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.context import EMPTY

D = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def once(tx: fs.GradientTransformation, u: torch.Tensor, w: Any = None) -> torch.Tensor:
    params = u if w is None else w
    found: torch.Tensor = tx.update({"w": u}, tx.init({"w": params}), {"w": params})[0]["w"]
    return found


def test_rows_are_divided_by_their_root_mean_squares_over_time() -> None:
    tx = fs.normalize_rows(0.8)
    grads = [randn(4, 6, seed=t) for t in range(3)]
    state = tx.init({"w": grads[0]})
    v = [0.0] * 4
    for g in grads:
        found, state = tx.update({"w": g}, state)
        rows = []
        for i, row in enumerate(g):
            v[i] = 0.8 * v[i] + 0.2 * float(row.dot(row)) / 6
            rows.append(row / (v[i] ** 0.5 + 1e-8))
        N = torch.stack(rows)
        assert torch.allclose(found["w"], N * (g.norm() / N.norm()), rtol=1e-12)
    assert state.second["w"].shape == (4,)


def test_rows_of_kernels_and_of_stacks() -> None:
    u = randn(3, 2, 4)
    flat = once(fs.normalize_rows(0.0), u)
    assert torch.allclose(flat.flatten(1), once(fs.normalize_rows(0.0), u.flatten(1)), rtol=1e-14)
    stacked = once(fs.normalize_rows(0.0, flatten_sides=False), u)
    for one, matrix in zip(stacked, u):
        assert torch.allclose(one, once(fs.normalize_rows(0.0), matrix), rtol=1e-14)


def test_signs_and_their_scales() -> None:
    u = torch.tensor([[3.0, 0.0], [-1.0, 4.0]], dtype=D)
    signs = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=D)
    for scale, factor in ((None, 1.0), (0.5, 0.5), ("mean", 2.0), ("sum", 8.0)):
        assert torch.equal(once(fs.sign(scale), u), factor * signs)
    blocks = torch.stack((u, 2 * u))
    tx = fs.sign("mean")
    found, _ = tx.update({"x": blocks}, tx.init({"x": blocks}, block_ndim=1), block_ndim=1)
    assert torch.equal(found["x"], torch.stack((2 * signs, 4 * signs)))


@pytest.mark.parametrize("rescale", [True, False])
def test_a_cautious_update_never_goes_against_the_gradient(rescale: bool) -> None:
    grads = [randn(5, 7, seed=t) for t in range(4)]
    tx, plain = fs.cautious(fs.trace(0.9), rescale=rescale), fs.trace(0.9)
    state, other = tx.init(grads[0]), plain.init(grads[0])
    for g in grads:
        found, state = tx.update(g, state)
        u, other = plain.update(g, other)
        agrees = (u * g > 0).double()
        expected = u * agrees / (agrees.mean() if rescale else 1.0)
        assert torch.allclose(found, expected, rtol=1e-14)
    assert 0 < agrees.mean() < 1


def test_cautious_refuses_steps() -> None:
    for steps in (fs.chain(fs.adamw(0.1)), fs.schedule_free(0.1), fs.blocked(fs.hyperball(0.1))):
        with pytest.raises(ValueError, match="turns them round: put that behind"):
            fs.cautious(steps)


def test_decay_only_where_it_agrees() -> None:
    u, w = randn(4, 5), randn(4, 5, seed=1)
    w[0, 0] = 0.0
    found = once(fs.add_cautious_decay(0.1), u, w)
    for i in range(4):
        for j in range(5):
            decay = 0.1 * w[i, j] if w[i, j] * u[i, j] >= 0 else 0.0
            assert torch.equal(found[i, j], u[i, j] + decay)


def test_centred_rows() -> None:
    u = randn(3, 2, 4)
    found = once(fs.centralize(), u)
    assert torch.allclose(found, u - u.flatten(1).mean(1)[:, None, None], rtol=1e-12)
    assert found.flatten(1).mean(1).abs().max() < 1e-15
    assert torch.equal(once(fs.centralize(), u[0, 0]), u[0, 0])


def test_units_are_clipped_one_by_one() -> None:
    u, w = randn(4, 3, 2), randn(4, 3, 2, seed=1)
    u[1] *= 1e-3
    w[2] = 0.0
    found = once(fs.adaptive_clip(0.1, 1e-2), u, w)
    for i in range(4):
        limit = 0.1 * max(float(w[i].norm()), 1e-2)
        expected = u[i] if u[i].norm() <= limit else u[i] * (limit / u[i].norm())
        assert torch.allclose(found[i], expected, rtol=1e-12)
    assert torch.equal(found[1], u[1])
    assert not torch.equal(found[0], u[0])
    v = randn(5)
    whole = once(fs.adaptive_clip(0.1), v, v)  # a vector is one unit
    assert torch.allclose(whole, 0.1 * v, rtol=1e-12)


def test_a_floor_under_the_step() -> None:
    u, w = randn(3, 4), randn(3, 4, seed=1)
    u[0] *= 1e-3
    found = once(fs.update_floor(0.7, per="row"), u, w)
    for i in range(3):
        factor = max(1.0, float(0.7 * w[i].norm() / u[i].norm()))
        assert torch.allclose(found[i], factor * u[i], rtol=1e-12)
    found = once(fs.update_floor(5.0), u, w)
    assert torch.allclose(found.norm(), 5.0 * w.norm(), rtol=1e-12)
    assert torch.allclose(found, u * (found.norm() / u.norm()), rtol=1e-12)
    assert not once(fs.update_floor(5.0), torch.zeros(3, dtype=D), randn(3)).any()


@pytest.mark.parametrize("outwards", [True, False])
def test_the_radial_part_is_braked_and_the_rest_stays(outwards: bool) -> None:
    w, across = randn(3, 4), randn(3, 4, seed=1)
    across -= w * (across * w).sum() / w.square().sum()
    u = across + (-0.8 if outwards else 0.8) * w
    found = once(fs.radial_brake(0.25, 3.0), u, w)
    expected = across + (-0.8 * 0.25 if outwards else 0.8 * 3.0) * w
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(once(fs.radial_brake(), u, torch.zeros_like(w)), u)


def test_the_hyperball_keeps_the_norm() -> None:
    u, w = randn(3, 4), randn(3, 4, seed=1)
    moved = w + once(fs.hyperball(0.3), u, w)
    V = w - 0.3 * w.norm() * u / u.norm()
    assert torch.allclose(moved, V * (w.norm() / V.norm()), rtol=1e-12)
    assert torch.allclose(moved.norm(), w.norm(), rtol=1e-14)
    V = w - 0.3 * u
    radius = w.norm() - 0.3 * (u * w).sum() / w.norm()
    moved = w + once(fs.hyperball(0.3, relative=False, radius="first_order"), u, w)
    assert torch.allclose(moved, V * (radius / V.norm()), rtol=1e-12)
    zero = torch.zeros_like(w)
    assert torch.equal(once(fs.hyperball(0.3), u, zero), zero)
    assert torch.allclose(once(fs.hyperball(0.3, relative=False), u, zero), -0.3 * u)


def test_the_hyperball_follows_a_schedule() -> None:
    tx = fs.hyperball(lambda count: 0.1 * (count + 1))
    w = {"w": torch.tensor([1.0, 0.0], dtype=D)}
    u = {"w": torch.tensor([0.0, -1.0], dtype=D)}
    state = tx.init(w)
    for t in (1, 2, 3):
        step, state = tx.update(u, state, w)
        moved = w["w"] + step["w"]
        assert moved[1] / moved[0] == pytest.approx(0.1 * t)


STAGES = {
    "add_cautious_decay": lambda: fs.add_cautious_decay(0.1),
    "adaptive_clip": fs.adaptive_clip,
    "update_floor": lambda: fs.update_floor(0.1),
    "radial_brake": fs.radial_brake,
    "hyperball": lambda: fs.hyperball(0.1),
}


@pytest.mark.parametrize("name", STAGES)
def test_missing_parameters_are_named_with_the_remedy(name: str) -> None:
    u = {"w": torch.ones(2, 2)}
    for tx, remedy in (
        (STAGES[name](), "pass params to update"),
        (fs.blocked(STAGES[name]()), r"blocked\(..., with_params=True\)"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs the parameters: {remedy}"):
            tx.update(u, tx.init(u))
    tx = STAGES[name]()
    with pytest.raises(ValueError, match="was given None: the combinator around it has to hand on"):
        tx.run(u, tx.init(u), None, EMPTY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.normalize_rows(1.0), "beta2 is 1.0"),
        (lambda: fs.normalize_rows(epsilon=-1.0), "epsilon is -1.0"),
        (lambda: fs.sign("max"), "scale is 'max'; choose one of 'mean', 'sum', None"),
        (lambda: fs.sign(-1.0), "scale is -1.0"),
        (lambda: fs.add_cautious_decay(-0.1), "weight_decay is -0.1"),
        (lambda: fs.adaptive_clip(0.0), "max_ratio is 0.0"),
        (lambda: fs.update_floor(-1.0), "min_ratio is -1.0"),
        (lambda: fs.update_floor(0.1, per="column"), "per is 'column'"),
        (lambda: fs.radial_brake(-1.0), "outward is -1.0"),
        (lambda: fs.hyperball(-1.0), "learning_rate is -1.0"),
        (lambda: fs.hyperball(0.1, radius="free"), "radius is 'free'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
