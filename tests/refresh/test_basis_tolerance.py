"""Adaptive refresh in a chain, against a plain loop over blocks in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import linalg
from funshampoo.linalg import adaptive
from funshampoo.refresh.turns import phase

N, ROWS, COLUMNS = 4, 6, 9


def gradients(steps: int) -> list[Tensor]:
    """Drawn from slowly turning distributions, block by block at another pace."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for t in range(steps):
        noise = torch.randn(N, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        angles = torch.arange(N) * 0.15 * t
        turn = torch.eye(ROWS, dtype=torch.float64).repeat(N, 1, 1)
        turn[:, 0, 0] = turn[:, 1, 1] = angles.cos()
        turn[:, 0, 1], turn[:, 1, 0] = -angles.sin(), angles.sin()
        sizes = torch.logspace(1, -1, ROWS, dtype=torch.float64)
        found.append(turn @ (sizes[:, None] * noise))
    return found


def plain(
    grads: list[Tensor], every: int, tolerance: float, stagger: bool
) -> tuple[list[Tensor], int, int]:
    """All updates, bases kept, bases renewed."""
    sides = (ROWS, COLUMNS)
    L = [[torch.zeros(d, d, dtype=torch.float64) for d in sides] for _ in range(N)]
    X = [[torch.eye(d, dtype=torch.float64) for d in sides] for _ in range(N)]
    Q = [[torch.eye(d, dtype=torch.float64) for d in sides] for _ in range(N)]
    history, kept, renewed = [], 0, 0
    for t, G in enumerate(grads, start=1):
        out = torch.empty_like(G)
        for n in range(N):
            for side, g in enumerate((G[n], G[n].T)):
                L[n][side] = 0.9 * L[n][side] + 0.1 * g @ g.T
                when = phase(n, every) if stagger else 0
                if t == 1 or t % every == when:
                    A = L[n][side] / (1 - 0.9**t)
                    B = Q[n][side].T @ A @ Q[n][side]
                    off = (B - B.diagonal().diag()).norm()
                    values, basis = B.diagonal(), Q[n][side]
                    kept += bool(off <= tolerance * A.norm())
                    renewed += not off <= tolerance * A.norm()
                    if off > tolerance * A.norm():
                        values, basis = torch.linalg.eigh(A)
                    f = (values.clamp(min=0) + 1e-3 * values.max()) ** -0.25
                    X[n][side], Q[n][side] = basis @ f.diag() @ basis.T, basis
            out[n] = X[n][0] @ G[n] @ X[n][1]
        history.append(out)
    return history, kept, renewed


@pytest.mark.parametrize("stagger", [False, True])
def test_a_chain_against_a_plain_loop(stagger: bool) -> None:
    grads = gradients(25)
    expected, kept, renewed = plain(grads, 3, 0.2, stagger)
    assert min(kept, renewed) > 10
    solver = linalg.eigh(relative_epsilon=1e-3)
    options: dict[str, Any] = {"stagger": stagger, "basis_tolerance": 0.2}
    tx = fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(3, solver=solver, **options))
    state = tx.init({"s": grads[0]}, block_ndim=1)
    for g, wanted in zip(grads, expected):
        u = {"s": g}
        out, state = tx.update(u, state, block_ndim=1, gradient=u, rows={"s": range(N)})
        assert torch.allclose(out["s"], wanted, rtol=1e-9, atol=1e-11)


def test_it_saves_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the others' numbers as they are: the mistake would keep every basis."""
    decomposed: list[int] = []
    original = adaptive.decompose
    monkeypatch.setattr(
        adaptive, "decompose", lambda A: (decomposed.append(len(A)), original(A))[1]
    )
    counts = []
    for tolerance in (0.0, 0.2, 10.0):
        decomposed.clear()
        tx = fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(3, basis_tolerance=tolerance))
        state = tx.init({"s": gradients(1)[0]}, block_ndim=1)
        for g in gradients(25):
            _, state = tx.update({"s": g}, state, block_ndim=1)
        counts.append(sum(decomposed))
    assert counts[0] == 2 * N * 9
    assert counts[2] == 0  # even the identity will do
    assert 10 < counts[1] < counts[0] - 10


def test_a_failed_root_keeps_its_basis_too() -> None:
    class Failing(type(linalg.eigh())):  # type: ignore[misc]
        def from_spectrum(self, A: Tensor, *args: Any) -> Any:
            found = super().from_spectrum(A, *args)
            return found._replace(converged=found.converged & (torch.arange(N) != 2))

    solver = Failing(relative_epsilon=1e-6)
    tx = fs.chain(
        fs.kronecker_statistics(0.9), fs.root_inverse(1, solver=solver, basis_tolerance=0.0)
    )
    _, state = tx.update(
        {"s": gradients(1)[0]}, tx.init({"s": gradients(1)[0]}, block_ndim=1), block_ndim=1
    )
    for side in state["root_inverse"].kept["s"]:
        _, bases = side.value
        eye = torch.eye(bases.shape[-1], dtype=torch.float64)
        same = [torch.equal(basis, eye) for basis in bases]
        assert same == [False, False, True, False]
        assert side.failures.tolist() == [0, 0, 1, 0]
