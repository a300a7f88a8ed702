"""Derivatives through eigenbases that are found and renewed, against central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import funshampoo as fs
from funshampoo import linalg
from tests.sooner import these

D = torch.float64
BASES = {
    "qr": linalg.qr(),
    "eigh": linalg.eigh(),
    "by_rank": linalg.by_rank(),
    "orthogonal_iteration": linalg.orthogonal_iteration(),
    "orthogonal_iteration sorted": linalg.orthogonal_iteration(sort=True, steps=2),
}
METHODS: dict[str, Callable[..., fs.GradientTransformation]] = {
    "soap": lambda **o: fs.soap(0.1, every=1, merge="none", vectors="blocks", **o),
    "kl_soap": lambda **o: fs.kl_soap(
        0.1, every=1, merge="none", damping=0.1, vectors="blocks", **o
    ),
    "kl_shampoo": lambda **o: fs.kl_shampoo(0.1, every=1, merge="none", vectors="blocks", **o),
    "eigenvalue_shampoo": lambda **o: fs.eigenvalue_shampoo(
        0.1, every=1, merge="none", epsilon=0.01, **o
    ),
}
every_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def after_some_steps(make: Callable[[], Any], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A number from parameters three steps on, whose gradients depend on them."""
    weights, A, B = [[drawn(*shape, seed=10 * i + t) for t in range(3)] for i in range(3)]

    def trained(w: Tensor) -> Tensor:
        tx = make()
        state = tx.init({"w": w})
        for t in range(3):
            g = {"w": A[t] * w + B[t] + 0.1 * w**3}
            updates, state = tx.update(g, state, {"w": w})
            w = w + updates["w"]
        return (w * weights[0]).sum()

    return trained


@every_basis
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", these([(3, 2), (2, 3, 2)], sooner=[(3, 2)]))
def test_derivatives_through_bases_are_right(basis: Any, method: str, shape: Any) -> None:
    number = after_some_steps(lambda: METHODS[method](basis=basis), shape)
    w, direction, h = drawn(*shape, seed=5), drawn(*shape, seed=6), 1e-6
    found = (grad(number)(w) * direction).sum()
    expected = (number(w + h * direction) - number(w - h * direction)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vmap(grad(number))(w[None])[0], grad(number)(w))


@every_basis
@pytest.mark.parametrize(
    "spoiled", [lambda w: 0 * w, lambda w: w * torch.tensor([1.0, 0.0], dtype=D)]
)
def test_derivatives_at_ties_are_finite(basis: Any, spoiled: Any) -> None:
    """Of matrices that are zero, or have a kernel of several dimensions."""
    number = after_some_steps(lambda: fs.soap(0.1, every=1, merge="none", basis=basis), (4, 2))
    assert grad(lambda w: number(spoiled(w)))(drawn(4, 2, seed=5)).isfinite().all()


@every_basis
def test_second_derivatives_are_right(basis: Any) -> None:
    number = after_some_steps(lambda: fs.soap(0.1, every=1, merge="none", basis=basis), (3, 2))
    w, direction, h = drawn(3, 2, seed=5), drawn(3, 2, seed=6), 1e-5

    def slope(w: Tensor) -> Tensor:
        return (grad(number)(w) * direction).sum()

    expected = (slope(w + h * direction) - slope(w - h * direction)) / (2 * h)
    for found in (
        (grad(slope)(w) * direction).sum(),
        jvp(slope, (w,), (direction,))[1],
        (grad(lambda w: jvp(number, (w,), (direction,))[1])(w) * direction).sum(),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jvp(lambda w: jvp(number, (w,), (direction,))[1], (w,), (direction,))


@pytest.mark.parametrize("columns", [4, 2])
def test_the_derivative_of_qr_is_torchs_where_that_exists(columns: int) -> None:
    Y, old = drawn(4, 4, seed=1), torch.eye(4, dtype=D)
    Y[:, columns:] = Y[:, :1]  # dependent columns have no direction of their own
    weights = drawn(4, 4, seed=2)

    def number(Y: Tensor, q: Callable[[Tensor], Tensor]) -> Tensor:
        return (q(Y)[:, :columns] * weights[:, :columns]).sum()

    mine = grad(number)(Y, lambda Y: linalg.basis.orthogonal(Y, old))
    theirs = grad(number)(Y[:, :columns], lambda Y: torch.linalg.qr(Y)[0])
    torch.testing.assert_close(mine[:, :columns], theirs)
    assert not mine[:, columns:].any()
