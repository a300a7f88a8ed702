"""Coordinates without a gradient stay apart from the others, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from funshampoo.linalg import eigh
from funshampoo.linalg.support import on_support

D, N = 6, 3
UNSEEN = ([1], [], [0, 5])
"""Rows of each matrix that are zero."""


def matrices(dtype: torch.dtype = torch.float32) -> Tensor:
    """(3, 6, 6), positive semidefinite; the second one without a zero row."""
    G = torch.randn(N, D, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for g, rows in zip(G, UNSEEN, strict=True):
        g[rows] = 0
    return G @ G.mT


def noise() -> Tensor:
    return torch.randn(N, D, D, generator=torch.Generator().manual_seed(1))


def assert_on_support(found: Tensor, X: Tensor) -> None:
    """Entry by entry, in Python."""
    for n, rows in enumerate(UNSEEN):
        for i in range(D):
            for j in range(D):
                off = i != j and (i in rows or j in rows)
                assert found[n, i, j] == (0 if off else X[n, i, j])


def test_zero_between_the_support_and_the_rest() -> None:
    assert_on_support(on_support(noise(), matrices()), noise())
    lead = on_support(noise()[None], matrices()[None])
    assert lead.shape == (1, N, D, D)
    assert_on_support(lead[0], noise())


def test_one_matrix_and_float64() -> None:
    X, A = noise().double(), matrices(torch.float64)
    found = torch.stack([on_support(x, a) for x, a in zip(X, A, strict=True)])
    assert found.dtype == torch.float64
    assert_on_support(found, X)


def test_nothing_to_do_is_nothing_done() -> None:
    X, A = noise(), matrices()
    for x, a in ((X[1], A[1]), (X[1:2], A[1:2]), (X[:0], A[:0])):
        assert on_support(x, a) is x


def test_what_is_not_finite_is_hidden_too() -> None:
    X = noise()
    X[0, 1, 2] = torch.nan
    X[0, 3, 1] = torch.inf
    assert on_support(X, matrices())[0].isfinite().all()


def test_pure() -> None:
    X, A = noise(), matrices()
    on_support(X, A)
    assert X.equal(noise())
    assert A.equal(matrices())


def test_gradients_are_finite_and_those_of_what_is_kept() -> None:
    X, A = noise().requires_grad_(), matrices().requires_grad_()
    (dX,) = torch.autograd.grad(on_support(X, A).sum(), X)
    assert_on_support(dX, torch.ones_like(dX))

    def f(A: Tensor) -> Tensor:  # a root whose gradient at the zero rows is far from zero
        return on_support(eigh()(A, 4, 1e-8).root, A).square().sum()

    assert grad(f)(matrices(torch.float64)).isfinite().all()


def test_under_vmap_and_in_a_graph() -> None:
    expected = on_support(noise(), matrices())
    assert vmap(on_support)(noise(), matrices()).equal(expected)
    one = vmap(on_support, in_dims=(0, None))(noise(), matrices()[0])
    assert one.equal(on_support(noise(), matrices()[:1].expand(N, D, D)))
    compiled = torch.compile(on_support, fullgraph=True, backend="aot_eager")
    assert compiled(noise(), matrices()).equal(expected)
    assert compiled(noise()[1], matrices()[1]).equal(noise()[1])


def test_nothing_is_read_from_another_device() -> None:
    found = on_support(noise().to("meta"), matrices().to("meta"))
    assert found.shape == (N, D, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_an_eigendecomposition_leaves_between_zero_rows(dtype: torch.dtype) -> None:
    d, unseen = 16, [1, 4, 7, 8, 15]
    G = torch.randn(d, 2 * d, dtype=dtype, generator=torch.Generator().manual_seed(0))
    G[unseen] = 0
    A = G @ G.mT
    X = eigh(relative_epsilon=1e-6)(A, 4, 0.0).root
    cleaned = on_support(X, A)
    assert X[unseen].count_nonzero() > len(unseen)  # else nothing is shown
    assert cleaned[unseen].count_nonzero() == cleaned[:, unseen].count_nonzero() == len(unseen)
    assert cleaned.diagonal().equal(X.diagonal())
    seen = torch.tensor([i for i in range(d) if i not in unseen])
    assert cleaned[seen][:, seen].equal(X[seen][:, seen])
