"""Bad matrices in a stack: flagged, replaced by the identity, of no consequence to others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from funshampoo import chain, kronecker_statistics, root_inverse
from funshampoo.linalg import (
    Solver,
    coupled_higher_order,
    coupled_newton,
    eigh,
    newton_schulz,
    pseudo_inverse,
)
from funshampoo.linalg import stacked_eigh as module
from funshampoo.linalg.estimates import spectral_norm

from .spectra import DTYPES, log_spaced, orthogonal, solvers, with_spectrum

ALL = {**solvers(torch.float32), "pseudo_inverse": pseudo_inverse()}
RETRYING = {**ALL, "coupled_newton": coupled_newton(), "newton_schulz": newton_schulz()}


def good(d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return with_spectrum(orthogonal(d, 4), log_spaced(d, 1e2), dtype)


def unaffected(solver: Solver, A: Tensor, bad: Tensor) -> None:
    """`bad` in the stack's second place fails there; the rest is what it was, to the last bit."""
    with_bad = A.clone()
    with_bad[1] = bad
    before, after = solver(A, 4, 0.0), solver(with_bad, 4, 0.0)
    assert after.converged.tolist() == [True, False, True, True]
    assert after.root[1].equal(torch.eye(A.shape[-1], dtype=A.dtype))
    others = torch.tensor([0, 2, 3])
    for x, y in zip(before, after, strict=True):
        assert x[others].equal(y[others])


@pytest.mark.parametrize("name", RETRYING)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_entry(name: str, value: float) -> None:
    bad = good()[0]
    bad[2, 1] = value
    unaffected(RETRYING[name], good(), bad)


@pytest.mark.parametrize("name", [n for n in RETRYING if n != "pseudo_inverse"])
def test_a_zero_matrix_without_damping(name: str) -> None:
    unaffected(RETRYING[name], good(), torch.zeros(8, 8))


def test_the_pseudo_inverse_of_nothing_is_zero() -> None:
    """Moore and Penrose: where no eigenvalue is kept, the root is 0, and that is no failure."""
    A = good()
    A[1] = 0
    found = pseudo_inverse()(A, 4, 0.0)
    assert found.converged.all()
    assert found.root[1].count_nonzero() == 0
    assert found.condition[1] == 1
    below = pseudo_inverse(atol=2.0)(A, 4, 0.0)
    assert below.converged.all()
    assert below.root.count_nonzero() == 0


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith(("eigh", "pseudo"))])
def test_an_indefinite_matrix(name: str) -> None:
    bad = torch.diag(torch.tensor([1.0, -1.0, 1, 1, 1, 1, 1, 1]))
    unaffected(ALL[name], good(), bad)


@pytest.mark.parametrize("name", ALL)
def test_failed_matrices_have_zero_gradient(name: str) -> None:
    A = good()
    A[1] = torch.nan
    A[2] = 0
    A.requires_grad_()
    result = ALL[name](A, 4, 0.0)
    assert result.converged.tolist() == [True, False, name == "pseudo_inverse", True]
    (gradient,) = torch.autograd.grad(result.root.square().sum(), A)
    assert gradient.isfinite().all()
    assert gradient[1:3].count_nonzero() == 0
    assert gradient[0].count_nonzero() == 64


def test_non_finite_epsilon() -> None:
    epsilon = torch.tensor([0.1, torch.nan, torch.inf, 0.1])
    for name in (n for n in RETRYING if n != "pseudo_inverse"):
        result = RETRYING[name](good(), 4, epsilon)
        assert result.converged.tolist() == [True, False, False, True], name
        assert result.root.isfinite().all()


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_newton_iterations_that_did_not_converge_are_never_used(p: int) -> None:
    """Undamped, singular to rounding, in float32: some iterates diverge to 1e21 and beyond."""
    A = with_spectrum(orthogonal(32, 16), log_spaced(32, 1e12), torch.float32)
    for make in (coupled_newton, newton_schulz):
        for max_residual in (0.1, 0.5):
            result = make(relative_epsilon=0.0, max_residual=max_residual)(A, p, 0.0)
            assert result.root.isfinite().all()
            assert (result.residual[result.converged] <= max_residual).all()
            # No eigenvalue of a root that is used exceeds that of the damping the solver ended
            # with.
            size = torch.linalg.matrix_norm(result.root, 2)
            assert (size <= 2 * result.condition.clamp(min=1) ** (1 / p))[result.converged].all()
            stand_in = torch.eye(32).expand(16, 32, 32)
            assert result.root[~result.converged].equal(stand_in[~result.converged])


def test_one_newton_iteration_is_not_a_root() -> None:
    A = good(dtype=torch.float64)
    result = coupled_newton(max_iterations=1, retries=0)(A, 4, 0.0)
    assert not result.converged.any()
    assert result.residual.isfinite().all()
    assert result.root.equal(torch.eye(8).double().expand(4, 8, 8))


NOT_CONVERGED = torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
INTERNAL = RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `...`")


def fail_when(
    condition: Callable[[Tensor], bool],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException = NOT_CONVERGED,
) -> list[Tensor]:
    """Make torch.linalg.eigh fail as LAPACK does, and return the list of what it is asked for."""
    calls, original = [], torch.linalg.eigh

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(A)
        if condition(A):
            raise error
        return original(A)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    return calls


def test_eigh_fails_in_float32_and_is_repeated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    A = good()
    expected = eigh()(A.double(), 4, 0.0).root
    calls = fail_when(lambda A: A.dtype == torch.float32, monkeypatch)
    result = eigh()(A, 4, 0.0)
    assert [call.dtype for call in calls[-2:]] == [torch.float32, torch.float64]
    assert result.converged.all()
    assert result.root.dtype == torch.float32
    torch.testing.assert_close(result.root, expected.float())


@pytest.mark.parametrize("error", [NOT_CONVERGED, INTERNAL, ValueError("illegal argument")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eigh_fails_on_one_matrix(
    dtype: torch.dtype, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For good: that one is flagged, the others are bitwise what they are without it."""
    A = good(dtype=dtype)
    bad = torch.diag(torch.arange(8, dtype=dtype) + 77)
    fail_when(lambda A: bool((A.diagonal(dim1=-2, dim2=-1) == 77).any()), monkeypatch, error)
    unaffected(eigh(), A, bad)
    unaffected(pseudo_inverse(), A, bad)


def test_eigh_fails_on_one_matrix_under_vmap_and_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    A = good(dtype=torch.float64)
    A[1] = torch.diag(torch.arange(8) + 77)
    fail_when(lambda A: bool((A.diagonal(dim1=-2, dim2=-1) == 77).any()), monkeypatch)
    converged = torch.func.vmap(lambda a: eigh()(a, 4, 0.0).converged)(A)
    assert converged.tolist() == [True, False, True, True]
    gradient = torch.func.vmap(torch.func.grad(lambda a: eigh()(a, 4, 0.0).root.sum()))(A)
    assert gradient[1].count_nonzero() == 0
    assert gradient[0].count_nonzero() > 0


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt, NotImplementedError]
)
def test_what_is_not_the_matrix_passes(
    error: type[BaseException], single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the call for the whole stack, and from that for one matrix after another error."""

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        if A.ndim == 2 or not single:
            raise error
        raise INTERNAL

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(error):
        eigh()(good(), 4, 0.0)


def test_a_run_goes_on_when_every_decomposition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old roots, here the identity."""
    fail_when(lambda A: True, monkeypatch, INTERNAL)
    tx = chain(kronecker_statistics(1.0), root_inverse(every=1))
    g = {"w": torch.randn(3, 2)}
    updates, state = tx.update(g, tx.init(g))
    assert updates["w"].equal(g["w"])
    assert [int(side.failures) for side in state["root_inverse"].kept["w"]] == [1, 1]


@pytest.mark.parametrize("d", [4, 5])
@pytest.mark.parametrize("most", [1, 50, 75, 100])
def test_a_stack_in_several_calls(d: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no call of more than so many numbers, but for a single matrix; the same bits."""
    A = with_spectrum(orthogonal(d, 7), log_spaced(d, 1e2), torch.float32)
    A = torch.stack([A, A.flip(0)])
    side = d + d % 2  # an odd side goes to LAPACK with a border
    expected = eigh()(A, 4, 0.0)
    monkeypatch.setattr(module, "_largest_call", lambda A: most)
    calls = fail_when(lambda A: False, monkeypatch)
    found = eigh()(A, 4, 0.0)
    sizes = [len(call) for call in calls]
    assert sum(sizes) == 14
    assert max(sizes) == max(most // side**2, 1)
    for x, y in zip(found, expected, strict=True):
        assert x.equal(y)
    assert found.root.shape == A.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_whose_squares_overflow_is_not_0(dtype: torch.dtype) -> None:
    """It was: v / ‖v R‖ = v / inf. The residual of a lost root said then that it was exact."""
    large = torch.finfo(dtype).max ** 0.7
    like = torch.zeros(2, 4, 4, dtype=dtype)
    assert (spectral_norm(lambda v: v * large, like, 4) >= 0.99 * large).all()
    assert spectral_norm(lambda v: v * large * large, like, 4).isnan().all()


@pytest.mark.parametrize(
    "solver",
    [newton_schulz(), coupled_newton(retries=0), coupled_higher_order()],
    ids=lambda solver: type(solver).__name__,
)
def test_no_verdict_lies_where_powers_of_the_root_overflow(solver: Solver) -> None:
    """Of indefinite matrices, in which eigenvalues grow without an end."""
    for d in (2, 16, 64):
        values = torch.linspace(-1, 1, d, dtype=torch.float64) * 0.9
        values[: d // 2] *= torch.logspace(-4, 0, d // 2, dtype=torch.float64)
        A = with_spectrum(orthogonal(d, 8), values, torch.float32)
        for p in (2, 3, 4, 8, 10, 12, 16, 32, 64):
            found = solver(A, p, 0.0)
            assert not found.converged.any(), (d, p)
            assert found.residual.isfinite().all()  # inf: there was nothing to solve


@pytest.mark.parametrize(
    "solver",
    [
        newton_schulz(),
        coupled_newton(retries=0),
        coupled_higher_order(),
        eigh(relative_epsilon=1e-6),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_root_beyond_the_range_is_none(solver: Solver) -> None:
    A = torch.diag(torch.tensor([1e-33, 0.0])) * torch.tensor([1.0, 1e33])[:, None, None]
    A = A.requires_grad_()  # the first: 1 / (1e-6 · 1e-33)
    found = solver(A, 1, 0.0)
    assert found.converged.tolist() == [False, True]
    assert found.root[0].equal(torch.eye(2))
    found.root.sum().backward()
    assert A.grad is not None
    assert A.grad[0].count_nonzero() == 0
    assert A.grad[1].isfinite().all()
