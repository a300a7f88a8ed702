"""The KL methods' arguments one by one, also those that no published trajectory shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from tests.migrate import plain_kl

STEPS = 8
KL = {
    "lr": 0.02,
    "betas": (0.8, 0.9),
    "shampoo_beta": 0.5,
    "eps": 1e-3,
    "weight_decay": 0.05,
    "precondition_frequency": 2,
}
EMERGING = {
    "lr": 0.02,
    "betas": (0.8, 0.9),
    "shampoo_beta": 0.7,
    "eps": 0.05,
    "weight_decay": 0.1,
}
KL_CHANGES: list[dict[str, Any]] = [
    {},
    {"shampoo_beta": -1},
    {"shampoo_beta": 0.0},
    {"normalize_grads": True},
    {"init_factor": 0.004},  # 1/√λ begins above the clamp
    {"using_damping": True},
    {"using_clamping": False},
    {"max_clamp_value": 11},
    {"precondition_frequency": 1, "weight_decay": 0.0},
]
EMERGING_CHANGES: list[dict[str, Any]] = [
    {},
    {"nesterov": True},
    {"correct_bias": False},
    {"shampoo_beta": 0.0},
    {"shampoo_beta": 0.0, "use_kl_shampoo": True},
    {"correct_bias": False, "nesterov": True},
    {"use_eigh": True},
    {"power_iter_steps": 3},
    {"max_update_rms": 0.2},
    {"use_kl_shampoo": True},
    {"use_kl_shampoo": True, "correct_shampoo_beta_bias": False},
    {"use_kl_shampoo": True, "use_eigh": True},
    {"weight_decay_method": "l2"},
    {"weight_decay_method": "independent"},
    {"weight_decay_method": "independent", "nesterov": True, "max_update_rms": 0.3},
]


def gradients(shape: tuple[int, int], size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, columns = [torch.linspace(1.0, 3.0, d).double() for d in shape]
    noise = [torch.randn(*shape, generator=generator).double() for _ in range(STEPS)]
    return [size * (rows[:, None] * x * columns / 4 + 0.3) for x in noise]


def start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).double()


def trajectory(tx: fs.GradientTransformation, w: Tensor, grads: list[Tensor]) -> list[Tensor]:
    params, found = {"w": w}, []
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"w": g}, state, params)
        params = fs.apply_updates(params, updates)
        found.append(params["w"])
    return found


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("changes", KL_CHANGES, ids=str)
@pytest.mark.parametrize("soap", [False, True], ids=["shampoo", "soap"])
def test_kl_methods_are_their_equations(soap: bool, changes: dict[str, Any]) -> None:
    args = {**KL, **changes}
    shape, size = (13, 12), 0.01  # so small that eigenvalues come to the clamp
    w, grads = start(shape), gradients(shape, size)
    expected = plain_kl.kl_methods(w, grads, args, soap)
    method = "KL-SOAP" if soap else "KL-Shampoo"
    found = trajectory(fs.from_published(method, **args), w, grads)
    assert largest_difference(found, expected) < 1e-10
    if changes:
        assert largest_difference(expected, plain_kl.kl_methods(w, grads, KL, soap)) > 1e-6


@pytest.mark.parametrize("changes", EMERGING_CHANGES, ids=str)
def test_emerging_optimizers_are_their_equations(changes: dict[str, Any]) -> None:
    args = {**EMERGING, **changes}
    w, grads = start((6, 6)), gradients((6, 6))
    expected = plain_kl.emerging(w, grads, args)
    found = trajectory(fs.from_published("SOAP (Emerging-Optimizers)", **args), w, grads)
    assert largest_difference(found, expected) < 1e-9
    if changes:
        assert largest_difference(expected, plain_kl.emerging(w, grads, EMERGING)) > 1e-6


def test_either_name_takes_using_klsoap() -> None:
    w, grads = start((5, 4)), gradients((5, 4))
    found = trajectory(fs.from_published("KL-Shampoo", using_klsoap=True, **KL), w, grads)
    expected = trajectory(fs.from_published("KL-SOAP", **KL), w, grads)
    assert largest_difference(found, expected) == 0


def test_sides_of_one_entry_are_dropped() -> None:
    w, grads = start((5, 4)), gradients((5, 4))
    tx = fs.from_published("KL-Shampoo", **KL)
    found = trajectory(tx, w.reshape(5, 1, 4, 1), [g.reshape(5, 1, 4, 1) for g in grads])
    expected = [x.reshape(5, 1, 4, 1) for x in trajectory(tx, w, grads)]
    assert largest_difference(found, expected) == 0


def test_vectors_and_scalars_take_part() -> None:
    tx = fs.from_published("KL-Shampoo", **KL)
    params = {"b": torch.ones(3), "s": torch.tensor(1.0), "one": torch.ones(1, 1)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
    assert all(u.isfinite().all() and u.abs().max() > 0 for u in updates.values())


def test_the_norm_of_the_weights_stays_with_hyperball() -> None:
    w, grads = start((5, 4)), gradients((5, 4))
    found = trajectory(fs.from_published("KL-SOAP-H (hyperball)", lr=0.1), w, grads)
    assert all(abs(float(x.norm() / w.norm()) - 1) < 1e-12 for x in found)
    assert largest_difference(found[1:], found[:-1]) > 1e-3


@pytest.mark.parametrize(
    ("method", "args", "error", "message"),
    [
        ("KL-Shampoo", {"cast_dtype": torch.bfloat16}, NotImplementedError, "cast_dtype.*float32"),
        ("KL-Shampoo", {"max_clamp_value": 0}, ValueError, "max_clamp_value"),
        ("KL-SOAP", {"using_klsoap": 2}, TypeError, "using_klsoap"),
        ("KL-SOAP", {"init_factor": 0.0}, ValueError, "initial_eigenvalue"),
        ("REKLS", {"eps": 0.0}, ValueError, "eps is 0.0"),
        ("REKLS", {"nesterov": True}, TypeError, "REKLS has no argument 'nesterov'"),
        ("REKLS", {"weight_decay_method": "x"}, ValueError, "weight_decay_method is 'x'"),
        ("SOAP (Emerging-Optimizers)", {"max_update_rms": -1.0}, ValueError, "max_update_rms"),
        ("SOAP (Emerging-Optimizers)", {"power_iter_steps": 0}, ValueError, "steps"),
    ],
)
def test_bad_arguments(method: str, args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fs.from_published(method, **args)
