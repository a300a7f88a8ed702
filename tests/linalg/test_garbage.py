"""What a library returns without an error and is no eigendecomposition counts as a failure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from funshampoo import blocked, chain, kronecker_statistics, root_inverse
from funshampoo.linalg import by_device, eigh, pseudo_inverse
from funshampoo.linalg.estimates import is_decomposition
from funshampoo.linalg.spectral import decompose
from funshampoo.linalg.stacked_eigh import stacked_eigh
from tests.trees import assert_equal

from .spectra import DTYPES, log_spaced, orthogonal, with_spectrum
from .test_failures import INTERNAL, unaffected

Pair = tuple[Tensor, Tensor]
RELYING = {
    "eigh": eigh(relative_epsilon=1e-6),
    "eigh:shifted": eigh(floor=False),
    "pseudo_inverse": pseudo_inverse(),
    "by_device": by_device(),
}


def _one_column_again(values: Tensor, Q: Tensor) -> Pair:
    return values, torch.cat([Q[..., -1:], Q[..., 1:]], -1)


def _random(values: Tensor, Q: Tensor) -> Pair:
    generator = torch.Generator().manual_seed(0)
    return values, torch.randn(Q.shape, generator=generator, dtype=Q.dtype)


def _others(values: Tensor, Q: Tensor) -> Pair:
    """Orthogonal, and of another matrix."""
    return values, Q.flip(-1)


def _halved(values: Tensor, Q: Tensor) -> Pair:
    return values, Q / 2


def _wrong_values(values: Tensor, Q: Tensor) -> Pair:
    return values + values[..., -1:], Q


def _nothing(values: Tensor, Q: Tensor) -> Pair:
    return torch.zeros_like(values), torch.zeros_like(Q)


def _not_finite(values: Tensor, Q: Tensor) -> Pair:
    return values, Q * float("nan")


def _infinite(values: Tensor, Q: Tensor) -> Pair:
    return values * float("inf"), Q


def _one_value_off(values: Tensor, Q: Tensor) -> Pair:
    off = torch.ones_like(values)
    off[..., -2] = 1.19  # the last one may be of what a stack of odd sides is bordered by
    return values * off, Q


def _a_bit_long(values: Tensor, Q: Tensor) -> Pair:
    return values, 1.03 * Q


GARBAGE = [
    _one_value_off,
    _a_bit_long,
    _one_column_again,
    _random,
    _others,
    _halved,
    _wrong_values,
    _nothing,
    _not_finite,
    _infinite,
]
every_garbage = pytest.mark.parametrize("garbage", GARBAGE, ids=lambda f: f.__name__)


def answer(
    garbage: Callable[..., Pair], is_bad: Callable[[Tensor], Tensor], patch: pytest.MonkeyPatch
) -> None:
    """torch.linalg.eigh returns this for the matrices that are bad."""
    original = torch.linalg.eigh

    def answering(A: Tensor) -> Pair:
        values, Q = original(A)
        wrong = garbage(values, Q)
        bad = is_bad(A)
        rows = torch.where(bad[..., None, None], wrong[1].mT, Q.mT)
        return torch.where(bad[..., None], wrong[0], values), rows.mT  # column by column

    patch.setattr(torch.linalg, "eigh", answering)


def marked(A: Tensor) -> Tensor:
    return (A.diagonal(dim1=-2, dim2=-1) == 77).any(-1)


@pytest.mark.parametrize("d", [4, 5, 8])
@pytest.mark.parametrize("name", RELYING)
@every_garbage
def test_one_bad_matrix_of_a_stack_fails_and_the_others_keep_their_bits(
    garbage: Callable[..., Pair], name: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in DTYPES:
        with monkeypatch.context() as patch:
            answer(garbage, marked, patch)
            A = with_spectrum(orthogonal(d, 4), log_spaced(d, 1e2), dtype)
            bad = with_spectrum(orthogonal(d, 4, 9), log_spaced(d, 1e2), dtype)[2] * 80
            bad[0, 0] = 77
            unaffected(RELYING[name], A, bad)


@every_garbage
def test_an_old_basis_is_kept_where_the_new_one_is_garbage(
    garbage: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block beside goes on as it would have. Both sides are one batch, block after block."""
    tx = blocked(chain(kronecker_statistics(0.5), root_inverse(1, basis_tolerance=1e-3)), 4)
    params = {"w": torch.zeros(4, 8)}
    grads = [torch.randn(4, 8, generator=torch.Generator().manual_seed(t)) for t in range(3)]

    def run(patched_from: int) -> Any:
        state = tx.init(params)
        with monkeypatch.context() as patch:
            for t, g in enumerate(grads):
                if t == patched_from:
                    answer(garbage, lambda A: torch.arange(len(A)) % 2 == 0, patch)
                updates, state = tx.update({"w": g}, state, params)
        return updates["w"], state.inner["root_inverse"].kept["4x4"]

    (out, kept), (expected, fine) = run(patched_from=2), run(patched_from=9)
    before = run_until(tx, params, grads[:2])
    for side, other, old in zip(kept, fine, before, strict=True):
        assert side.failures.tolist() == [1, 0]
        for x, y, z in zip(side.value, other.value, old.value, strict=True):
            assert torch.equal(x[0], z[0])
            assert torch.equal(x[1], y[1])
    assert_equal(out[:, 4:], expected[:, 4:])
    assert out.isfinite().all()


def run_until(tx: Any, params: Any, grads: list[Tensor]) -> Any:
    state = tx.init(params)
    for g in grads:
        _, state = tx.update({"w": g}, state, params)
    return state.inner["root_inverse"].kept["4x4"]


@every_garbage
def test_under_vmap_and_grad(garbage: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    A = with_spectrum(orthogonal(8, 4), log_spaced(8, 1e2), torch.float64)
    A[1] = A[1] * 80
    A[1, 0, 0] = 77
    answer(garbage, marked, monkeypatch)
    converged = torch.func.vmap(lambda a: eigh()(a, 4, 0.0).converged)(A)
    assert converged.tolist() == [True, False, True, True]
    gradient = torch.func.vmap(torch.func.grad(lambda a: eigh()(a, 4, 0.0).root.sum()))(A)
    assert gradient[1].count_nonzero() == 0
    assert gradient[0].count_nonzero() > 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 32, 129, 400])
def test_what_lapack_finds_passes_by_far(d: int, dtype: torch.dtype) -> None:
    """Of full and of lower rank, tied, zero, and at both ends of the range of the dtype."""
    generator = torch.Generator().manual_seed(d)
    G = torch.randn(2, d, max(d // 2, 1), generator=generator, dtype=dtype)
    tied = torch.eye(d, dtype=dtype).expand(1, d, d)
    A = torch.cat([G @ G.mT, G @ G.mT + tied, tied, 0 * tied])
    largest = math.log10(torch.finfo(dtype).max)
    for exponent in (0.0, 0.8 * largest, -0.8 * largest, -1.05 * largest):
        found = decompose(A * 10**exponent)
        assert found.decomposed.all(), exponent
        assert found.values.isfinite().all()


def test_one_wrong_vector_of_many_is_found() -> None:
    A = with_spectrum(orthogonal(512, 1), log_spaced(512, 1e4), torch.float32)
    values, Q, _ = stacked_eigh(A)
    assert is_decomposition(A, values, Q).all()
    for column in (0, 255, 511):
        wrong = Q.clone()
        wrong[..., column] = wrong[..., column - 1]
        assert not is_decomposition(A, values, wrong).any()


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_a_root_with_one_wrong_vector_of_many_fails(
    condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = with_spectrum(orthogonal(512, 1), log_spaced(512, condition), torch.float32)
    values, Q, _ = stacked_eigh(A)
    for column in (1, 255, 511):
        wrong = Q.clone()
        wrong[..., column] = wrong[..., column - 1]
        monkeypatch.setattr(torch.linalg, "eigh", lambda _, wrong=wrong: (values, wrong))
        assert not eigh()(A, 4, 0.0).converged.any()
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (values, Q))
    assert eigh()(A, 4, 0.0).converged.all()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TypeError("eigh(): argument 'A' must be Tensor, not NoneType"), True),
        (AttributeError("'NoneType' object has no attribute 'mT'"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `...`"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (INTERNAL, False),
        (OSError("whatever a wrapper makes of it"), False),
    ],
    ids=str,
)
def test_which_errors_are_the_matrix(
    error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(A: Tensor) -> Pair:
        raise error

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    A = torch.eye(3).expand(2, 3, 3)
    if passes:
        with pytest.raises(type(error), match=re.escape(str(error))):
            eigh()(A, 4, 0.0)
    else:
        assert not eigh()(A, 4, 0.0).converged.any()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (2, 0, 0)])
def test_a_wrong_shape_is_an_error_of_the_caller(shape: tuple[int, ...]) -> None:
    for solve in (*RELYING.values(), lambda A, *_: stacked_eigh(A)):
        with pytest.raises(ValueError, match="must have shape"):
            solve(torch.ones(shape), 4, 0.0)
    with pytest.raises(TypeError, match="must be float32 or float64"):
        stacked_eigh(torch.ones(2, 2, dtype=torch.float16))


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-30, 2.0**-130])
@pytest.mark.parametrize("wrong", ["zeros", "nan", "one nan", "halves", "others' vectors"])
def test_eigenvalues_that_are_none(wrong: str, scale: float) -> None:
    """However small A is: what is no number of A's is told from rounding, at denormal ones too."""
    X = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    A = X @ X.T / 128 * scale
    values, Q = torch.linalg.eigh(A)
    assert bool(is_decomposition(A, values, Q))
    if wrong == "zeros":
        assert not bool(is_decomposition(A, 0 * values, torch.eye(32)))
    found = {"zeros": 0 * values, "nan": values * torch.nan, "halves": values / 2}
    values = found.get(wrong, values.clone())
    if wrong == "one nan":
        values[3] = torch.nan
    assert not bool(is_decomposition(A, values, Q.roll(1, 1) if wrong[:6] == "others" else Q))
