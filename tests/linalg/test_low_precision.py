"""Products with bfloat16 operands: how far off, where they lie, and what stays in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import funshampoo as fs
from funshampoo.linalg import low_precision
from funshampoo.linalg.low_precision import rounded_gram, rounded_matmul
from funshampoo.operators.mode_products import precondition
from funshampoo.state import KroneckerState, find_state
from funshampoo.testing import check_stage
from tests.test_position import SUBSETS, N, _moved, one_thread, randn, rows_of
from tests.trees import assert_close, gradients, problem, tensors, train

__all__ = ["one_thread"]  # a fixture, for all tests here

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "shape",
    [
        (17, 17, 17),
        (9, 300, 9),
        (41, 41, 41),
        (64, 64, 64),
        (33, 65, 65),
        (2, 100, 100),
        (100, 100, 2),
        (129, 127, 128),
        (81, 81, 576),
        (300, 300, 3),
        (9, 9, 9),  # small: in float32
        (80, 80, 1),  # with a vector: likewise
        (1, 80, 80),
    ],
    ids=str,
)
def test_a_rows_bits_do_not_depend_on_its_place(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = randn(N, rows, inner), randn(N, inner, columns, seed=1)
    for left in (a, a.mT.contiguous().mT):
        for right in (b, b.mT.contiguous().mT):
            together = rounded_matmul(left, right, BF16)
            large = min(rows, columns) > 1 and rows * inner * columns > 4096
            assert together.dtype == (BF16 if large else torch.float32)
            exact = left.double() @ right.double()
            assert (together - exact).abs().max() < 0.02 * exact.abs().max()
            for chosen in [*SUBSETS, [*range(N)] * 3]:
                own_left, own_right = (_moved(x, chosen) for x in (left, right))
                own = rounded_matmul(own_left, own_right, BF16)
                assert torch.equal(own, together[chosen])


@pytest.mark.parametrize("block", [(30, 1), (24, 40), (41, 41), (81, 64), (17, 11, 23), (41,)])
def test_every_number_of_a_chain(block: tuple[int, ...]) -> None:
    tx = chain_on_blocks()
    stacks = [randn(N, *block, seed=t) for t in range(4)]
    together = run(tx, stacks)
    for rows in SUBSETS:
        own = run(tx, [x[rows] for x in stacks])
        pairs = zip(tensors(own), rows_of(together, rows))
        assert all([torch.equal(a, b) for a, b in pairs])


def chain_on_blocks() -> fs.GradientTransformation:
    root = fs.root_inverse(every=2, product_dtype=BF16)
    statistics = fs.kronecker_statistics(0.99, product_dtype=BF16)
    return fs.chain(statistics, fs.graft(root, onto=fs.scale_by_adam(0.0)))


def run(tx: fs.GradientTransformation, stacks: list[Tensor]) -> Any:
    state, history = tx.init({"stack": stacks[0]}, block_ndim=1), []
    for x in stacks:
        updates, state = tx.update({"stack": x}, state, block_ndim=1)
        history.append(updates)
    return history, state


@pytest.mark.parametrize("block", [(64, 64), (40, 81), (20, 18, 22)], ids=str)
def test_the_error_of_ill_conditioned_roots(block: tuple[int, ...]) -> None:
    """Against float64, at a condition of 1e6, on gradients of the same statistics and on white."""
    roots = []
    for side, d in enumerate(block):
        basis = torch.linalg.qr(randn(4, d, d, dtype=torch.float64, seed=side)).Q
        values = torch.logspace(0, -6, d, dtype=torch.float64) ** (-1 / (2 * len(block)))
        roots.append((basis * values) @ basis.mT)
    white = randn(4, *block, dtype=torch.float64)
    for x in (white, precondition(white, [torch.linalg.inv(r) for r in roots], 1)):
        exact = precondition(x, roots, 1)
        found = precondition(x.float(), [r.float() for r in roots], 1, BF16)
        assert found.dtype == torch.float32
        error = ((found - exact).norm() / exact.norm()).item()
        assert 5e-4 < error < 0.06
        wide = precondition(x, roots, 1, BF16)  # float64 parameters
        assert wide.dtype == torch.float64
        assert 5e-4 < ((wide - exact).norm() / exact.norm()).item() < 0.06


def test_statistics_on_a_cpu_are_those_without() -> None:
    g = {"g": randn(40, 40)}
    states = []
    for dtype in (None, BF16):
        tx = fs.blocked(fs.kronecker_statistics(0.9, product_dtype=dtype))
        states.append(tx.update(g, tx.init(g))[1])
    for a, b in zip(tensors(states[0]), tensors(states[1])):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [40, 9])
def test_on_cuda_the_product_of_bfloat16_comes_in_float32(n: int) -> None:
    """Shapes and dtypes alone, with tensors that only say that they are on a GPU."""
    with FakeTensorMode():
        x = torch.empty(3, n, n, device="cuda")
        product = rounded_gram(x, BF16)
        assert (product is not None) == (n == 40)
        assert product is None or (product.dtype, product.shape) == (torch.float32, x.shape)
        assert rounded_gram(x.double(), BF16) is None
        assert rounded_gram(x, None) is None
        tx = fs.kronecker_statistics(0.9, product_dtype=BF16)
        state = tx.init({"g": x}, block_ndim=1)
        _, state = tx.update({"g": x}, state, block_ndim=1)
        found = find_state(state, KroneckerState)
        assert found is not None
        assert all(f.dtype == torch.float32 for f in found.factors["g"])


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 81, 256])
def test_statistics_on_a_gpu_stay_positive_semidefinite(d: int) -> None:
    """The Gram matrix of the rounded gradient to float32's rounding."""
    g = randn(4, d, d // 2).cuda()
    g = g * torch.logspace(0, -3, d // 2, device="cuda")
    tx = fs.kronecker_statistics(1.0, product_dtype=BF16)
    _, state = tx.update({"g": g}, tx.init({"g": g}, block_ndim=1), block_ndim=1)
    found = find_state(state, KroneckerState)
    assert found is not None
    rounded = g.to(BF16).double()
    for factor, x in zip(found.factors["g"], (rounded, rounded.mT)):
        expected = x @ x.mT
        scale = expected.abs().max().item()
        assert factor.dtype == torch.float32
        assert (factor - expected).abs().max() < 1e-5 * scale
        assert torch.linalg.eigvalsh(factor.double()).min() > -1e-4 * scale


@pytest.mark.slow
def test_the_common_checks_with_small_products_rounded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_precision, "SMALL", 0)

    def low() -> fs.GradientTransformation:
        return fs.shampoo(0.1, every=2, max_size=4, product_dtype=BF16)

    check_stage(low, params=problem(), compile=False)


def test_the_small_products_of_that_test_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(dtype: torch.dtype | None) -> Any:
        tx = fs.shampoo(0.1, every=2, max_size=4, product_dtype=dtype)
        return train(tx, problem(), gradients(3), fs.apply_updates)[0]

    assert_close(trained(BF16), trained(None), 0.0)
    monkeypatch.setattr(low_precision, "SMALL", 0)
    with pytest.raises(AssertionError):
        assert_close(trained(BF16), trained(None), 1e-5)
    assert_close(trained(BF16), trained(None), 0.1)


@pytest.mark.slow
def test_compiled_and_derivatives() -> None:
    """One graph; and the gradient of a loss of the updates is that without, to the rounding."""
    torch._dynamo.reset()
    params, g = {"w": randn(40, 24)}, {"w": randn(40, 24, seed=1)}
    tx, plain = (fs.shampoo(0.1, product_dtype=dtype) for dtype in (BF16, None))
    _, state = tx.update(g, tx.init(params), params)
    compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    expected = tx.update(g, state, params, refresh=False)
    assert_close(compiled(g, state, params, refresh=False), expected, 1e-3)

    def loss(tx: fs.GradientTransformation, g: Any) -> Tensor:
        updates, _ = tx.update(g, state, params, refresh=False)
        return torch.sum(updates["w"] * params["w"])

    found, exact = (torch.func.grad(lambda g, t=t: loss(t, g))(g)["w"] for t in (tx, plain))
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_another_dtype_is_an_error_that_names_the_choice() -> None:
    for make in (fs.root_inverse, fs.kronecker_statistics):
        with pytest.raises(ValueError, match=r"product_dtype is torch\.float16; choose one of"):
            make(product_dtype=torch.float16)
