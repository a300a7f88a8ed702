"""The numbers of the family's stages and recipes: tensors, batched, differentiated, live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

import funshampoo as fs
from funshampoo.core.live import Live
from funshampoo.core.tree import flatten, leaf_names, map_leaves
from tests.core.test_every_live_number import TABLE, Numbers, built
from tests.trees import assert_close, gradients, problem, tensors

D, D32 = torch.float64, torch.float32
Make = Callable[[Any], fs.GradientTransformation]

NUMBERS: dict[str, Make] = {
    "normalize_rows:beta2": lambda x: fs.normalize_rows(x),
    "normalize_rows:epsilon": lambda x: fs.normalize_rows(epsilon=x),
    "sign": lambda x: fs.sign(x),
    "add_cautious_decay": lambda x: fs.add_cautious_decay(x),
    "adaptive_clip": lambda x: fs.adaptive_clip(x),
    "adaptive_clip:epsilon": lambda x: fs.adaptive_clip(0.1, 10 * x),
    "update_floor": lambda x: fs.update_floor(10 * x),
    "radial_brake": lambda x: fs.radial_brake(x, 2 * x),
    "hyperball": lambda x: fs.hyperball(x),
    "schedule_free": lambda x: fs.schedule_free(x),
    "schedule_free:beta": lambda x: fs.schedule_free(0.1, x),
    "primal_average": lambda x: fs.primal_average(x, average=0.5, interpolation=0.5),
    "primal_average:numbers": lambda x: fs.primal_average(0.1, average=x, interpolation=2 * x),
    "ema_nesterov": lambda x: fs.ema_nesterov(x, x),
    "tail_average": lambda x: fs.chain(fs.scale(x), fs.tail_average(2, x)),
    "ema:nesterov": lambda x: fs.ema(x, nesterov=True),
    "muon": lambda x: fs.muon(x, momentum=2 * x, weight_decay=x),
    "normuon": lambda x: fs.normuon(x, momentum=2 * x, beta2=x, weight_decay=x),
    "normuon:cautious": lambda x: fs.normuon(0.1, weight_decay=x, cautious_decay=True),
    "spectral_descent": lambda x: fs.spectral_descent(x, beta1=x),
    "splus": lambda x: fs.splus(x, beta1=x, beta2=2 * x, average=x, weight_decay=x, every=2),
    "soap_muon": lambda x: fs.soap_muon(
        x, momentum=2 * x, beta2=x, outward=x, inward=2 * x, min_ratio=x
    ),
    "eigenvalue_shampoo": lambda x: fs.eigenvalue_shampoo(
        x, beta1=x, beta2=2 * x, epsilon=x, weight_decay=x, every=2, start=2
    ),
    "second_moment": lambda x: fs.scale_by_second_moment(x, x, damping="floor"),
    "decay_after_step": lambda x: fs.decay_after_step(x, 2 * x),
    "schedule_free:reference": lambda x: fs.from_reference(
        lr=x,
        betas=(x, 0.9),
        epsilon=1e-3,
        weight_decay=x,
        iterate_averaging_config={"type": "ScheduleFreeConfig"},
    ),
    "lion": lambda x: fs.lion(x, beta1=x, beta2=2 * x, weight_decay=x),
    "sign_descent": lambda x: fs.sign_descent(x, beta1=x, scale=x),
    "schedule_free:published": lambda x: fs.from_published(
        "AdamWScheduleFree", lr=x, warmup_steps=3, weight_decay=x
    ),
}
# by 2 x, where x is live
DERIVED = {
    "update_floor",
    "radial_brake",
    "muon",
    "normuon",
    "lion",
    "splus",
    "soap_muon",
    "eigenvalue_shampoo",
    "decay_after_step",
}
each = pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)


PARAMS, GRADS = problem(), gradients(4)


def trained(make: Make, x: Any) -> Any:
    tx, params = make(x), PARAMS
    state = tx.init(params)
    for g in GRADS:
        updates, state = tx.update(g, state, params)
        params = fs.apply_updates(params, updates)
    return params, [s for s in tensors(state) if s.is_floating_point()]


@each
def test_an_ensemble_over_numbers_is_a_loop(make: Make) -> None:
    numbers = torch.tensor([0.05, 0.2, 0.4], dtype=D)
    together = vmap(lambda x: trained(make, x))(numbers)
    for i, x in enumerate(numbers):
        alone = trained(make, float(x))
        mine = [t[i] if t.ndim else t for t in tensors(together)]
        assert_close(mine, tensors(alone), 1e-10)


@each
def test_derivatives_by_a_number_are_finite(make: Make) -> None:
    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in tensors(trained(make, x)[0])]).sum()

    assert grad(total)(torch.tensor(0.3, dtype=D)).isfinite()


LIVE: dict[str, Make] = {
    name: make for name, make in NUMBERS.items() if name.count(":") == 0 and name not in DERIVED
}


@pytest.mark.parametrize("make", LIVE.values(), ids=LIVE)
def test_a_live_number_is_looked_up_on_every_step(make: Make) -> None:
    tx, params, g = make(Live("x", 0.3)), PARAMS, GRADS[0]
    state = tx.init(params)
    for x in (0.05, 0.4):
        found, _ = tx.update(g, state, params, hyper={"x": x})
        fixed = make(x)
        expected, _ = fixed.update(g, fixed.init(params), params)
        assert_close(found, expected, 1e-12)


def _with_scalars() -> Any:
    """In float32 and bfloat16, with leaves of order 0: torch promotes those by any number's."""
    torch.manual_seed(0)
    shapes = {"w": (4, 3), "v": (5,), "s": (), "layers": (2, 3, 2)}
    return {n: torch.randn(s).to(torch.bfloat16 if n == "v" else D32) for n, s in shapes.items()}


def _looks(tree: Any) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, x.dtype, x.shape) for name, x in zip(leaf_names(tree), flatten(tree)[0])]


def _stepped(tx: fs.GradientTransformation) -> None:
    """Four steps, in which neither the state nor the updates take the dtype of a number."""
    params = _with_scalars()
    state = tx.init(params)
    looks = _looks(state)
    for _ in range(4):
        g = map_leaves(torch.randn_like, params)
        updates, state = tx.update(g, state, params)
        assert _looks(state) == looks
        assert {u.dtype for u in flatten(updates)[0]} <= {D32, torch.bfloat16}


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_numbers_in_float64_change_no_dtype(entry: Numbers) -> None:
    numbers = {name: torch.tensor(x, dtype=D) for name, (x, _) in entry.numbers.items()}
    if "mask" in entry.options:
        pytest.skip("its mask is for other parameters")
    _stepped(built(entry, numbers))


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: fs.schedule_free(rate),
        lambda rate: fs.primal_average(rate, average=0.5, interpolation=0.5),
        lambda rate: fs.scale_by_learning_rate(rate),
        lambda rate: fs.hyperball(rate),
        lambda rate: fs.ema_nesterov(rate),
        lambda rate: fs.from_published("RAdamScheduleFree", lr=rate, silent_sgd_phase=False),
        lambda rate: fs.from_published("AdamWScheduleFree", lr=rate, warmup_steps=3),
    ],
)
def test_schedules_in_float64_change_no_dtype(make: Make) -> None:
    _stepped(make(lambda count: 0.1 / (count.double() + 1)))
