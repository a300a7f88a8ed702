"""Mistakes that were measured in other implementations: ours avoid them.

More of them are tested with the part that they are about; those docstrings begin with "Measured
elsewhere".
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg
from tests.trees import assert_close, assert_unchanged, gradients, problem, snapshot, tensors, train


@pytest.mark.parametrize(
    "tx",
    [
        fs.shampoo(0.1, grafting="sgd", beta1=0.0, every=2, start=4),
        fs.shampoo(0.1, grafting="sgd", bias_correction=False, every=2, start=4),
        fs.shampoo(0.1, weight_decay=0.1, weight_decay_kind="coupled"),
        fs.shampoo(0.1, weight_decay=0.1, momentum=0.9, decay_through_momentum=True),
        fs.sgd(0.1, momentum=0.9, weight_decay=0.1),
    ],
    ids=["sgd_grafting", "sgd_grafting_of_the_ema", "coupled", "through_momentum", "sgd"],
)
@pytest.mark.parametrize("donate", [False, True])
def test_4_neither_gradients_nor_other_stages_buffers_are_written_to(
    tx: fs.GradientTransformation, donate: bool
) -> None:
    """Updates that a caller keeps and scales in place must not reach back into the state."""
    params, grads = problem(), gradients(5)
    expected, _, _ = train(tx, params, grads, fs.apply_updates)
    before = snapshot(grads)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params, donate=donate)
        params = fs.apply_updates(params, updates)
        for u in tensors(updates):
            u.mul_(float("nan"))
    assert_unchanged(before, grads)
    assert_close(params, expected, 0.0)


def _low_rank_gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def outer(rows: int, columns: int) -> torch.Tensor:
        left = torch.randn(rows, 1, generator=generator)
        return 1e-2 * left @ torch.randn(1, columns, generator=generator)

    return [
        {
            "matrix": outer(32, 16),
            "vector": 1e-2 * torch.randn(64, generator=generator),
            "kernel": outer(8, 36).reshape(8, 4, 3, 3),
        }
        for _ in range(steps)
    ]


def _gains(tx: fs.GradientTransformation, grads: list[Any]) -> dict[str, list[float]]:
    """‖update‖ / ‖gradient‖ of every step and leaf."""
    params = {k: torch.zeros_like(g) for k, g in grads[0].items()}
    state = tx.init(params)
    gains: dict[str, list[float]] = {k: [] for k in params}
    for g in grads:
        updates, state = tx.update(g, state, params)
        for k, u in updates.items():
            gains[k].append(float(u.norm() / g[k].norm()))
    return gains


def test_6_no_jump_after_the_first_refresh_without_grafting() -> None:
    """f = 10 and no grafting: the steps after a refresh meet directions that it has not seen."""
    grads = _low_rank_gradients(40)
    ours = fs.shampoo(1.0, grafting=None, beta1=0.0, every=10, start=10)
    theirs = fs.shampoo(
        1.0, grafting=None, beta1=0.0, every=10, start=10, epsilon=1e-12, solver=linalg.eigh()
    )
    for k, gains in _gains(ours, grads).items():
        assert max(gains[10:]) < 5 * gains[9], k  # the refresh step itself is Shampoo's own
    jumping = _gains(theirs, grads)["matrix"]
    assert max(jumping[10:19]) > 1e4 * jumping[9]  # the fixture provokes the mistake


def test_9_damping_does_not_accumulate_in_the_statistics() -> None:
    tx = fs.chain(fs.kronecker_statistics(1.0), fs.root_inverse(1, epsilon=10.0))
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    state = tx.init({"w": g})
    for _ in range(5):
        _, state = tx.update({"w": g}, state)
    left, right = state["kronecker_statistics"].factors["w"]
    assert torch.equal(left, 5 * g @ g.T)
    assert torch.equal(right, 5 * g.T @ g)


def test_10_products_never_write_over_their_own_inputs() -> None:
    """Donated statistics: L ← beta2 L + (1 - beta2) G Gᵀ in L's own memory, the right product."""
    g = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tx = fs.kronecker_statistics(0.9)
    state = tx.init({"w": g}, block_ndim=1)
    factor = state.factors["w"][0]
    for _ in range(3):
        _, state = tx.update({"w": g}, state, gradient={"w": g}, block_ndim=1, donate=True)
    assert state.factors["w"][0].data_ptr() == factor.data_ptr()  # in place indeed
    expected = torch.einsum("nij,nkj->nik", g, g) * (1 - 0.9**3)
    assert torch.allclose(state.factors["w"][0], expected, rtol=1e-12)


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory layouts."""
    base = torch.zeros(*(2 * d for d in x.shape), dtype=x.dtype)
    strided = base[tuple(slice(None, None, 2) for _ in x.shape)]
    strided.copy_(x)
    reversed_axes = x.permute(*reversed(range(x.ndim))).contiguous()
    layouts = {"strided": strided, "permuted": reversed_axes.permute(*reversed(range(x.ndim)))}
    if x.ndim == 4:
        layouts["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    return layouts


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5), (8, 4, 3, 3)], ids=str)
def test_12_any_memory_layout(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    tx = fs.shampoo(0.1, every=2, max_size=4, momentum=0.9, weight_decay=0.1)
    expected, _, _ = train(tx, {"w": w}, [{"w": g} for g in grads], fs.apply_updates)
    for name, parameter in _layouts(w).items():
        for layout in _layouts(w):
            strange = [{"w": _layouts(g)[layout]} for g in grads]
            got, _, _ = train(tx, {"w": parameter}, strange, fs.apply_updates)
            assert torch.allclose(got["w"], expected["w"], rtol=1e-12), (name, layout)


@pytest.mark.parametrize("grafting", [None, "adam"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
def test_16_zero_gradients_first_do_not_prepare_a_jump(grafting: Any, epsilon: float) -> None:
    """Zeros for 10 steps, then gradients between two refreshes: no ε^(-1/4) = 1000 I to meet."""
    grads = _low_rank_gradients(9)
    zeros = [{k: torch.zeros_like(g) for k, g in grads[0].items()}] * 10
    tx = fs.shampoo(1.0, grafting=grafting, beta1=0.0, every=10, epsilon=epsilon)
    params = grads[0]
    _, updates, state = train(tx, params, zeros + grads, lambda p, u: p)
    assert all(float(u.abs().max()) == 0 for u in tensors(updates[:10]))
    for step, g in zip(updates[10:], grads):
        for k, u in step.items():
            limit = g[k].norm() if grafting is None else 10 * g[k].numel() ** 0.5
            assert float(u.norm()) <= 1.001 * float(limit), k
    assert fs.state.find_state(state, fs.state.Kept).failures.sum() == 0  # type: ignore[union-attr]


def test_17_no_process_wide_side_effects() -> None:
    """Importing and stepping leave torch's flags, the warnings filters and folders alone."""
    script = """
import os, tempfile, warnings
import torch
os.chdir(tempfile.mkdtemp())
def flags():
    return (
        repr(torch.tensor([1 / 3])), torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), list(warnings.filters),
        torch.get_rng_state().tolist(), os.listdir("."), os.listdir(tempfile.gettempdir()),
        torch.get_default_device(),
    )
before = flags()
import funshampoo
from funshampoo import linalg
params = {"w": torch.ones(4, 3), "b": torch.ones(3)}
g = {"w": torch.full((4, 3), float("nan")), "b": torch.ones(3)}
for solver in (linalg.eigh(), linalg.coupled_newton(), linalg.newton_schulz()):
    tx = funshampoo.shampoo(0.1, every=1, solver=solver)
    state = tx.init(params)
    for gradient in (params, g, params):
        u, state = tx.update(gradient, state, params)
assert flags() == before, [a for a, b in zip(flags(), before) if a != b]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
