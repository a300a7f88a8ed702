"""Rotation into bases and back, against einsum; exact zeros of roots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funshampoo.linalg.support import on_support
from funshampoo.operators.mode_products import precondition, rotate
from tests.test_position import SUBSETS, N, one_thread, randn

__all__ = ["one_thread"]  # a fixture, for all tests here

D = torch.float64
SHAPES = [(1,), (9,), (20,), (1, 7), (9, 5), (24, 40), (5, 7, 3), (16, 16, 9), (4, 3, 5, 2)]


def bases(shape: tuple[int, ...], lead: tuple[int, ...], dtype: torch.dtype = D) -> list[Tensor]:
    return [torch.linalg.qr(randn(*lead, d, d, dtype=dtype, seed=d))[0] for d in shape]


@pytest.mark.parametrize("lead", [(), (N,)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation_is_a_product_with_each_basis(
    shape: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    """Of matrices that are neither symmetric nor orthogonal, so that a transpose would show."""
    x = randn(*lead, *shape, dtype=D)
    Q: list[Tensor | None] = [randn(*lead, d, d, dtype=D, seed=d) for d in shape]
    if len(shape) > 2:
        Q[1] = None
    n, axes = "n" * len(lead), "abcd"[: len(shape)]
    for back in (False, True):
        expected = x
        for i, matrix in enumerate(Q):
            if matrix is not None:
                pair = f"z{axes[i]}" if back else f"{axes[i]}z"
                to = axes.replace(axes[i], "z")
                expected = torch.einsum(f"{n}{pair},{n}{axes}->{n}{to}", matrix, expected)
        found = rotate(x, Q, len(lead), back)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_undoes_it(shape: tuple[int, ...]) -> None:
    x, Q = randn(N, *shape, dtype=D), bases(shape, (N,))
    assert torch.allclose(rotate(rotate(x, Q, 1), Q, 1, back=True), x, rtol=1e-12, atol=1e-12)
    symmetric = [matrix + matrix.mT for matrix in Q]
    products = precondition(x, symmetric, 1)
    for back in (False, True):
        assert torch.allclose(rotate(x, symmetric, 1, back), products, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_does_not_notice_its_neighbours(
    shape: tuple[int, ...], dtype: torch.dtype, back: bool
) -> None:
    x, Q = randn(N, *shape, dtype=dtype), bases(shape, (N,), dtype)
    together = rotate(x, Q, 1, back)
    for rows in SUBSETS:
        own = rotate(x[rows], [matrix[rows] for matrix in Q], 1, back)
        assert torch.equal(own, together[rows])


def test_it_batches() -> None:
    x, Q = randn(N, 5, 7, 3, dtype=D), bases((5, 7, 3), (N,))
    batched = torch.func.vmap(lambda x, *Q: rotate(x, Q))(x, *Q)
    assert torch.allclose(batched, rotate(x, Q, 1), rtol=1e-12, atol=1e-12)


def test_nothing_beside_the_diagonal_where_a_matrix_is_zero() -> None:
    g = randn(3, 5, 8, dtype=D)
    g[1, 2] = 0.0
    A, X = g @ g.mT, randn(3, 5, 5, dtype=D, seed=1)
    found = on_support(X, A)
    expected = X.clone()
    expected[1, 2, :2] = expected[1, 2, 3:] = expected[1, :2, 2] = expected[1, 3:, 2] = 0.0
    assert torch.equal(found, expected)
    assert on_support(X[[0, 2]], A[[0, 2]]).equal(X[[0, 2]])
    whole = X[[0, 2]].clone()
    assert on_support(whole, A[[0, 2]]) is whole
    assert torch.equal(torch.func.vmap(on_support)(X, A), expected)
    assert torch.equal(torch.compile(on_support, backend="eager", fullgraph=True)(X, A), expected)
