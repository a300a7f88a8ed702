"""A row's results do not depend, to the last bit, on its place in a stack or the stack's length.

On a CPU with one thread: with more, MKL divides the products of a stack of one row among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import linalg
from funshampoo.linalg import products
from tests.sooner import these

DTYPES = [torch.float32, torch.float64]
N = 6
SUBSETS = [[0], [1], [5], [4, 1, 2]]
BLOCKS = [
    (9,),
    (20,),
    (41,),
    (1, 30),
    (30, 1),
    (9, 9),
    (10, 7),
    (24, 40),
    (41, 41),
    (81, 64),
    (9, 256),
    (5, 7, 3),
    (16, 16, 9),
    (4, 3, 5, 2),
]
PARTNERS = {
    "adam": lambda: fs.scale_by_adam(0.0),
    "rms": fs.scale_by_rms,
    "adagrad": fs.scale_by_adagrad,
    "sgd": fs.scale_by_sgd,
}
SOLVERS = {
    "eigh": linalg.eigh(relative_epsilon=1e-6),
    "pseudo_inverse": linalg.pseudo_inverse(),
    "coupled_newton": linalg.coupled_newton(),
    "newton_schulz": linalg.newton_schulz(),
    "coupled_higher_order": linalg.coupled_higher_order(),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rows_of(tree: Any, rows: list[int]) -> list[Tensor]:
    """The chosen rows of all per-block tensors; whatever has no rows as it is."""
    chosen = torch.tensor(rows)
    leaves = [x for x in optree.tree_leaves(tree) if isinstance(x, Tensor)]
    return [x.index_select(0, chosen) if x.ndim else x for x in leaves]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all([torch.equal(a, b) for a, b in zip(found, expected)])


def train(partner: str, stacks: list[Tensor], donate: bool) -> tuple[Any, ...]:
    """All updates and the last state of the recipe's inner chain, in block space."""
    root = fs.root_inverse(every=2)
    tx = fs.chain(
        fs.kronecker_statistics(0.99),
        fs.ema(0.9),
        fs.graft(root, onto=PARTNERS[partner]()),
        fs.trace(0.9),
    )
    state = tx.init({"stack": torch.zeros_like(stacks[0])}, block_ndim=1)
    history = []
    for x in stacks:
        tree = {"stack": x}
        context = {"gradient": tree, "block_ndim": 1, "donate": donate}
        updates, state = tx.update(tree, state, **context)
        history.append(updates["stack"])
    return history, state


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_number_of_a_chain(block: tuple[int, ...], partner: str) -> None:
    stacks = [randn(N, *block, seed=t) for t in range(4)]
    together = train(partner, stacks, donate=False)
    for i, rows in enumerate(SUBSETS):
        own = train(partner, [x[rows] for x in stacks], donate=i % 2 == 1)
        everything = list(range(len(rows)))
        assert_same(rows_of(own, everything), rows_of(together, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "d",
    these([1, 2, 3, 5, 7, 9, 10, 25, 41, 64, 81], sooner=[1, 2, 5, 9, 10, 41]),
)
def test_roots_residuals_and_conditions(d: int, solver: str, dtype: torch.dtype) -> None:
    x = randn(N, d, max(1, d // 2), dtype=dtype)
    A = x @ x.mT + 1e-3 * torch.eye(d, dtype=dtype)
    together = SOLVERS[solver](A, 6, 0.0)
    for rows in SUBSETS:
        assert_same(list(SOLVERS[solver](A[rows], 6, 0.0)), rows_of(together, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (41, 41, 41),
        (9, 9, 9),
        (7, 10, 10),
        (10, 7, 11),
        (9, 300, 9),
        (41, 41, 1),
        (1, 41, 41),
        (40, 40, 1),
        (1, 40, 40),
        (40, 1, 40),
        (1, 40, 1),
        (1, 1, 30),
        (64, 9, 9),
        (3, 1, 1),
    ],
)
def test_products(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    """In any layout of the operands, and from memory that begins anywhere."""
    a, b = randn(N, rows, inner, dtype=dtype), randn(N, inner, columns, dtype=dtype, seed=1)
    for left in (a, a.mT.contiguous().mT):
        for right in (b, b.mT.contiguous().mT):
            together = products.matmul(left, right)
            assert together.is_contiguous()
            torch.testing.assert_close(together, a @ b)
            for chosen in SUBSETS:
                own = [_moved(x, chosen) for x in (left, right)]
                assert torch.equal(products.matmul(*own), together[chosen])
            fit = [products.aligned(x) for x in (left, right)]
            together = products.multiply(*fit)
            for chosen in SUBSETS:
                own = [products.aligned(_moved(x, chosen)) for x in (left, right)]
                assert columns == 1 or torch.equal(products.multiply(*own), together[chosen])
        together = products.gram(left)
        torch.testing.assert_close(together, a @ a.mT)
        for chosen in SUBSETS:
            assert torch.equal(products.gram(_moved(left, chosen)), together[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "side",
    [7, 64, 65, 129, 256, 512, 550, pytest.param(1023, marks=pytest.mark.slow)],
)
def test_squares(side: int, dtype: torch.dtype) -> None:
    """B Bᵀ, of a large one from the upper blocks; also of matrices laid out by columns."""
    B = randn(N, side, side, dtype=dtype)
    for left in (B, B.mT.contiguous().mT):
        together = products.square(left)
        rounding = dict.fromkeys(("atol", "rtol"), 30 * side**0.5 * torch.finfo(dtype).eps)
        torch.testing.assert_close(together, together.mT, **rounding)
        torch.testing.assert_close(together, B @ B.mT, **rounding)
        for chosen in SUBSETS:
            assert torch.equal(products.square(_moved(left, chosen)), together[chosen])
        alone = products.square(left[0])
        torch.testing.assert_close(alone, together[0], **rounding)


def _moved(x: Tensor, rows: list[int]) -> Tensor:
    """The rows of x, in its layout, as a view that begins one number into its memory."""
    transposed = x.stride(-2) < x.stride(-1)
    source = (x.mT if transposed else x)[rows]
    view = torch.empty(source.numel() + 1, dtype=x.dtype)[1:].view(source.shape).copy_(source)
    return view.mT if transposed else view


def test_what_is_aligned_is_not_copied() -> None:
    for x in (randn(N, 8, 6), randn(N, 6, 8).mT, randn(5, 5), randn(1, 5, 5)):
        assert products.aligned(x) is x
    odd = randn(2, N, 9, 5)
    for x in (odd, odd.mT):
        moved = products.aligned(x)
        assert torch.equal(moved, x)
        assert (moved.stride(-2) == 1) == (x.stride(-2) == 1)
        assert not any([step % 4 for step in moved.stride()[:2]])
        assert products.aligned(moved) is moved


@pytest.mark.parametrize("shape", [(5, 5, 5), (5, 3, 1), (1, 3, 5), (3, 1, 5)], ids=str)
def test_products_have_derivatives_and_batch(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = randn(2, rows, inner, dtype=torch.float64), randn(2, inner, columns, dtype=torch.float64)
    operands = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(products.matmul, operands)
    assert torch.autograd.gradgradcheck(products.matmul, operands)
    assert torch.autograd.gradcheck(products.gram, (a,))
    many = torch.stack((a, 2 * a)).detach()
    for function in (lambda x: products.matmul(x, b), products.gram):
        batched = torch.func.vmap(function)(many)
        torch.testing.assert_close(batched, torch.stack([function(x) for x in many]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers(dtype: torch.dtype) -> None:
    x = randn(37, 11, dtype=dtype).abs() + 0.01
    for exponent in (-1 / 4, -1 / 6, 1 / 3, 4):
        together = products.power(x, exponent)
        torch.testing.assert_close(together, x**exponent)
        for i in range(37):
            assert torch.equal(products.power(x[i : i + 1], exponent)[0], together[i])
            assert torch.equal(products.power(x[:, 0], exponent)[i], together[i, 0])
    A = randn(N, 5, 5, dtype=dtype) / 2
    for p in (1, 2, 3, 4, 7):
        expected = torch.linalg.matrix_power(A, p)
        torch.testing.assert_close(products.matrix_power(A, p), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_odd_sides_are_decomposed_as_well_as_by_lapack(dtype: torch.dtype, scale: float) -> None:
    """They go to it with a row and a column more, of which nothing may be left in the result."""
    x = randn(4, 9, 9, dtype=dtype)
    rank_3, diagonal = x[0, :, :3] @ x[0, :, :3].mT, x[1].diagonal().abs().diag()
    zero, ones = torch.zeros_like(x[0]), torch.ones_like(x[0])
    A = scale * torch.stack([x[0] @ x[0].mT, x[1] + x[1].mT, rank_3, diagonal, zero, ones])
    values, vectors, decomposed = linalg.spectral.decompose(A)
    assert decomposed.all()
    eps, size = 30 * torch.finfo(dtype).eps, float(A.abs().max())
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=0, atol=eps * size)
    rebuilt = (vectors * values[..., None, :]) @ vectors.mT
    torch.testing.assert_close(rebuilt, A, rtol=0, atol=eps * size)
    identity = torch.eye(9, dtype=dtype).expand_as(A)
    torch.testing.assert_close(vectors @ vectors.mT, identity, rtol=0, atol=eps)
    for i, matrix in enumerate(A):
        alone = linalg.spectral.decompose(matrix)
        assert torch.equal(alone.values, values[i])
        assert torch.equal(alone.vectors, vectors[i])


def test_a_failure_of_lapack_moves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The odd-sided neighbours of a matrix that it fails on are what they are without it."""
    x = randn(N, 9, 9)
    A = x @ x.mT
    expected = linalg.eigh()(A, 4, 0.0)
    bad, original = torch.full((1, 9, 9), 77.0), torch.linalg.eigh

    def failing(A: Tensor) -> Any:
        if (A[..., 0, 0] == 77).any():
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return original(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = linalg.eigh()(torch.cat([A[:2], bad, A[2:]]), 4, 0.0)
    assert not found.converged[2]
    assert torch.equal(found.root[2], torch.eye(9))
    assert_same(rows_of(found, [0, 1, 3, 4, 5, 6]), list(expected))
