"""The iterations themselves: their iterates, when they stop, what they retry, how many steps they
take.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from funshampoo.linalg import coupled_higher_order, coupled_newton, eigh, newton_schulz
from funshampoo.linalg.newton_schulz import _inverse_root
from funshampoo.linalg.root_steps import TABLES, Step, root_steps

from .spectra import DTYPES, log_spaced, low_rank, orthogonal, relative_error, with_spectrum


def plain_newton(A: Tensor, p: int, tolerance: float, max_iterations: int) -> Tensor:
    """The iteration as it is written down, for one matrix."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype)
    z: Tensor = (p + 1) / (2 * torch.linalg.matrix_norm(A))
    X, M = z ** (1 / p) * identity, z * A
    for _ in range(max_iterations):
        if (M - identity).abs().max() <= tolerance:
            break
        N = ((p + 1) * identity - M) / p
        X, M = X @ N, torch.linalg.matrix_power(N, p) @ M
    return X


@pytest.mark.parametrize("p", [1, 2, 4, 6])
@pytest.mark.parametrize("max_iterations", [0, 1, 5, 9, 100])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-10])
def test_the_iterates_of_each_matrix_alone(p: int, max_iterations: int, tolerance: float) -> None:
    """The stack's matrices stop at different steps; none is touched after its own."""
    Q = orthogonal(6, 4)
    A = torch.stack([with_spectrum(Q[i], log_spaced(6, 10.0**i) * 3.0**i) for i in range(4)])
    solver = coupled_newton(
        relative_epsilon=0.0,
        max_iterations=max_iterations,
        tolerance=tolerance,
        retries=0,
        max_residual=float("inf"),
    )
    expected = torch.stack([plain_newton(a, p, tolerance, max_iterations) for a in A])
    torch.testing.assert_close(solver(A, p, 0.0).root, expected, rtol=1e-10, atol=1e-12)


def test_an_error_that_rises_in_the_first_step_is_no_divergence() -> None:
    """max|M - I| rises from 0.65 to 0.79 here, although the iteration converges."""
    v = torch.tensor([0.948, 0.318], dtype=torch.float64)
    A = torch.stack([torch.outer(w, w) for w in (v, torch.tensor([0.6, 0.8]).double())])
    for angle in torch.linspace(0, math.pi, 50, dtype=torch.float64):
        w = torch.stack([angle.cos(), angle.sin()])
        A = torch.cat([A, torch.outer(w, w)[None]])
    for p in (2, 4):
        assert coupled_newton(relative_epsilon=0.0, retries=0)(A, p, 1e-6).converged.all()


def test_retry_raises_the_damping_of_failures_alone() -> None:
    d = 16
    A = with_spectrum(orthogonal(d), low_rank(d, 4), torch.float32)
    A[1] = with_spectrum(orthogonal(d, 1)[0], log_spaced(d, 10), torch.float32)
    once = coupled_newton(relative_epsilon=0.0, retries=0)(A, 4, 0.0)
    assert once.converged.tolist() == [False, True, False]
    result = coupled_newton(relative_epsilon=0.0, retries=3)(A, 4, 0.0)
    assert result.converged.all()
    assert all(x[1].equal(y[1]) for x, y in zip(once, result, strict=True))
    # From zero, the damping starts at d·eps·λmax and is raised tenfold, at most twice here.
    least = d * torch.finfo(torch.float32).eps
    damping = 1 / (result.condition[0].item() - 1)
    assert 0.9 * least < damping < 110 * least
    assert relative_error(result.root[0], eigh()(A[0].double(), 4, damping).root) < 0.05


def test_no_retries_for_what_can_not_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def counted(A: Tensor, n: int) -> Tensor:
        products.append(n)
        return A

    monkeypatch.setattr(torch.linalg, "matrix_power", counted)
    A = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
    assert not coupled_newton()(A, 4, 0.0).converged.any()
    assert not products


def taken(x: Tensor, step: Step, p: int) -> Tensor:
    """x N(x^p)."""
    t = 1 - x**p if step.around_one else x**p
    return x * sum(c * t**j for j, c in enumerate(step.coefficients))


@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 8, 11])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize("condition", [1.0, 1.01, 3.0, 10.0, 1e3, 3e7, 1e10, 1e16])
def test_steps_bring_every_value_within_the_tolerance(
    p: int, condition: float, tolerance: float
) -> None:
    lower = condition ** (-1 / p)
    x = torch.logspace(math.log10(lower), 0, 10_000, dtype=torch.float64)
    for step in root_steps(p, lower, tolerance):
        x = taken(x, step, p)
        assert x.min() > 0
        assert x.max() ** p < 1.4
    assert (x - 1).abs().max() < tolerance + 1e-14


@pytest.mark.parametrize("kind", ["grow", "settle"])
@pytest.mark.parametrize("p", TABLES)
def test_no_polynomial_of_its_degree_is_better(p: int, kind: str) -> None:
    """Chebyshev: the best of five coefficients is the one that touches its bounds in turn, six
    times.
    """
    table = TABLES[p]
    bounds = {
        "grow": (table.grows_from, table.grown, 0.99),
        "settle": (table.grown, 1 - table.settled, 1 + table.settled),
    }
    lower, least, most = bounds[kind]
    x = torch.linspace(lower, 1, 100_000, dtype=torch.float64)
    y = taken(x, Step(getattr(table, kind)), p)
    assert least <= y.min() < y.max() <= most
    touches = [(y - y.min()) < 1e-6, (y.max() - y) < 1e-6]
    ends = (touches[1].double() - touches[0].double())[touches[0] | touches[1]]
    assert 1 + (ends.diff() != 0).sum() == 6
    assert ends[0] == -1


@pytest.mark.parametrize("p", TABLES)
def test_what_grows_is_taken_where_nothing_falls_back(p: int) -> None:
    """Below the interval that a table's `grow` is the best for it has to rise."""
    table = TABLES[p]
    x = torch.linspace(0, table.grows_from, 100_000, dtype=torch.float64)
    y = taken(x, Step(table.grow), p)
    assert (y[1:] > x[1:]).all()
    assert y.max() <= 0.99 + 1e-9
    assert (y.cummax(0).values == y).all() or y[y < y.cummax(0).values].min() >= table.grown


@pytest.mark.parametrize(
    ("p", "products"), [(1, 27), (2, 27), (3, 31), (4, 30), (5, 70), (6, 30), (8, 30), (9, 34)]
)
def test_products_of_a_root(p: int, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refresh takes on a GPU, at the defaults and 1,024 a side."""
    counted = [0]
    for name in ("newton_schulz", "products"):
        module = sys.modules[f"funshampoo.linalg.{name}"]
        matmul = module.matmul

        def count(a: Tensor, b: Tensor, matmul: Any = matmul) -> Tensor:
            counted[0] += 1
            product: Tensor = matmul(a, b)
            return product

        monkeypatch.setattr(module, "matmul", count)
    _inverse_root(torch.empty(1, 1024, 1024, device="meta"), max(p, 2), 1e6, 1e-6)
    assert counted[0] == products


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4, 4.5, 5, 6, 8, 9])
def test_newton_schulz_reaches_1e_10_in_float64_at_its_default_damping(p: float) -> None:
    A = with_spectrum(orthogonal(64), low_rank(64, 16))
    result = newton_schulz(relative_epsilon=0.0, tolerance=1e-12)(A, p, 1e-6)
    truth = with_spectrum(orthogonal(64), (low_rank(64, 16) + 1e-6) ** (-1 / p))
    assert relative_error(result.root, truth) < 5e-10


@pytest.mark.parametrize(
    ("make", "p"),
    [
        *[(make, p) for make in (coupled_newton, newton_schulz) for p in (2, 3, 4, 8)],
        *[(newton_schulz, p) for p in (1.5, 4.5, 5, 6)],
    ],
)
def test_defaults_are_enough_in_float32(make, p: float) -> None:  # type: ignore[no-untyped-def]
    """Rank-deficient stacks at the default damping: every root is accepted, and is right."""
    for d in (1, 2, 8, 64, 256):
        count = 64 if d < 64 else 2
        values = low_rank(d, max(1, d // 4))
        Q = orthogonal(d, count)
        result = make()(with_spectrum(Q, values, torch.float32), p, 0.0)
        assert result.converged.all(), d
        truth = with_spectrum(Q, (values + 1e-6) ** (-1 / p))
        assert relative_error(result.root, truth) < 0.5 / p


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_newton_schulz_flags_a_condition_beyond_its_promise(dtype: torch.dtype) -> None:
    A = with_spectrum(orthogonal(16), log_spaced(16, 1e5), dtype)
    assert not newton_schulz(relative_epsilon=0.0, condition=1e2)(A, 4, 0.0).converged.any()
    assert newton_schulz(relative_epsilon=0.0, condition=1e5)(A, 4, 0.0).converged.all()


@pytest.mark.parametrize("order", [2, 3, 4, 6])
@pytest.mark.parametrize("p", [1, 2, 4, 6, 2.5, 4 / 3])
def test_higher_order_against_truth(order: int, p: float) -> None:
    spectrum = log_spaced(12, 1e4)
    A = with_spectrum(orthogonal(12, 3), spectrum, torch.float64)[0].repeat(3, 1, 1)
    A = A * torch.tensor([1.0, 1e-20, 1e20], dtype=torch.float64)[:, None, None]
    found = coupled_higher_order(relative_epsilon=0.0, tolerance=1e-12, order=order)(A, p, 7.0)
    assert found.converged.all()
    values, Q = torch.linalg.eigh(A)
    truth = (Q * values.pow(-1 / p)[..., None, :]) @ Q.mT
    error = torch.linalg.matrix_norm(found.root - truth) / torch.linalg.matrix_norm(truth)
    assert error.max() < 1e-9


def test_higher_order_follows_the_plain_iteration() -> None:
    """Iterate by iterate: what it gives at a loose tolerance, or when it is cut off."""
    A = with_spectrum(orthogonal(6, 5), log_spaced(6, 50.0), torch.float64)[0]
    p, order, identity = 4, 3, torch.eye(6, dtype=torch.float64)
    ridged = A + 1e-3 * A.abs().sum(-1).max() * identity
    M = ridged / torch.trace(ridged)
    X = identity * torch.trace(ridged) ** (-1 / p)
    b = [1, 1 / p, (1 + p) / (2 * p * p)]
    for step in range(6):
        E = identity - M
        N = b[0] * identity + b[1] * E + (b[2] * E @ E if step else 0)
        X, M = X @ N, torch.linalg.matrix_power(N, p) @ M
    solver = coupled_higher_order(
        relative_epsilon=1e-3, max_iterations=6, tolerance=0.0, order=order, max_residual=10.0
    )
    torch.testing.assert_close(solver(A, p, 0.0).root, X, rtol=1e-11, atol=1e-13)


def test_higher_order_keeps_out_what_did_not_converge() -> None:
    A = with_spectrum(orthogonal(6, 5), log_spaced(6, 1e6), torch.float64)[0]
    found = coupled_higher_order(relative_epsilon=0.0, max_iterations=2)(A, 4, 0.0)
    assert not found.converged
    assert found.root.equal(torch.eye(6, dtype=torch.float64))


def test_derivatives_of_a_root_at_the_default_tolerance() -> None:
    """A polynomial may be within 1e-6 everywhere and not rise at all: of s^(-1/4), two orders."""
    A = torch.eye(3, dtype=torch.float64) + 0.1

    def root(s: Tensor) -> Tensor:
        return newton_schulz(relative_epsilon=0.0)(s * A, 4, 0.0).root.sum()

    s, c = torch.tensor(2.0, dtype=torch.float64), 3 * 1.3**-0.25
    first, second = torch.func.grad(root)(s), torch.func.grad(torch.func.grad(root))(s)
    torch.testing.assert_close(first.item(), -0.25 * 2**-1.25 * c, rtol=1e-9, atol=0)
    torch.testing.assert_close(second.item(), 0.3125 * 2**-2.25 * c, rtol=1e-5, atol=0)
