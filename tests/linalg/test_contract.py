"""What every solver promises whatever its method: purity, shapes, and errors that help."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funshampoo.linalg import (
    by_device,
    coupled_higher_order,
    coupled_newton,
    eigh,
    newton_schulz,
    pseudo_inverse,
)
from funshampoo.linalg.adaptive import ritz_values
from funshampoo.linalg.cholesky_qr import cholesky_qr
from funshampoo.linalg.estimates import is_decomposition, is_orthogonal, largest_eigenvalue
from funshampoo.linalg.norms import block_norm
from funshampoo.refresh.jobs import Asked, outcome
from tests.refresh.clients import Root

SOLVERS = {
    "by_device": by_device(),
    "eigh": eigh(),
    "pseudo_inverse": pseudo_inverse(),
    "coupled_newton": coupled_newton(),
    "newton_schulz": newton_schulz(),
}
INTEGER = ["coupled_newton", "newton_schulz"]


@pytest.mark.parametrize("name", SOLVERS)
@given(lead=st.lists(st.integers(0, 3), max_size=3), d=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_leading_dimensions(name: str, lead: list[int], d: int) -> None:
    A = 2 * torch.eye(d).expand(*lead, d, d)
    result = SOLVERS[name](A, 2, 0.0)
    torch.testing.assert_close(result.root, A / 8**0.5, rtol=1e-5, atol=1e-6)
    assert result.residual.shape == result.condition.shape == result.converged.shape == (*lead,)
    assert result.converged.dtype == torch.bool
    assert result.residual.dtype == A.dtype


SHAPED: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "block_norm": lambda A: [block_norm(A, A.ndim - 2)],
    "cholesky_qr": lambda A: [cholesky_qr(A, A)],
    "is_decomposition": lambda A: [is_decomposition(A, A[..., 0], A)],
    "is_orthogonal": lambda A: [is_orthogonal(A)],
    "largest_eigenvalue": lambda A: [largest_eigenvalue(A)],
    "refresh": lambda A: outcome(Root(A.shape[-1]), Asked(A, (), A[..., 0, 0]))[1:],
    "ritz_values": lambda A: ritz_values(A, A),
    "eigh": lambda A: eigh()(A, 4),
    "newton_schulz": lambda A: newton_schulz()(A, 4),
    "pseudo_inverse": lambda A: pseudo_inverse()(A, 4),
}


@pytest.mark.parametrize("shape", [(1, 1), (2, 1, 1), (1, 1, 1), (2, 3, 3)])
@pytest.mark.parametrize("name", SHAPED)
def test_without_numbers_too_shapes_are_those(name: str, shape: tuple[int, ...]) -> None:
    """A graph and a device that is busy go by them. Some torch had others for a side of 1."""
    A = torch.eye(shape[-1]).expand(shape)
    there, here = ([x.shape for x in SHAPED[name](A.to(where))] for where in ("meta", "cpu"))
    assert there == here


@pytest.mark.parametrize("name", SOLVERS)
def test_pure(name: str) -> None:
    G = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    A = G @ G.mT
    before, version = A.clone(), A._version
    first, second = (SOLVERS[name](A, 4, 0.0) for _ in range(2))
    assert A.equal(before)
    assert A._version == version
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_only_the_root_carries_gradients(name: str) -> None:
    result = SOLVERS[name](torch.eye(3, requires_grad=True), 2, 0.0)
    assert [x.requires_grad for x in result] == [True, False, False, False]


@pytest.mark.parametrize("name", SOLVERS)
def test_no_random_state_is_used(name: str) -> None:
    before = torch.get_rng_state()
    SOLVERS[name](torch.eye(3), 2, 0.0)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", SOLVERS)
def test_wrong_static_arguments(name: str) -> None:
    solve = SOLVERS[name]
    for dtype in (torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="A must be float32 or float64"):
            solve(torch.eye(2, dtype=dtype), 2, 0.0)
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(ValueError, match=r"A must have shape \(\.\.\., d, d\)"):
            solve(torch.ones(shape), 2, 0.0)
    for p in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="p must be"):
            solve(torch.eye(2), p, 0.0)
    with pytest.raises(ValueError, match="epsilon (is|must be)"):
        solve(torch.eye(2), 2, -1e-3)


@pytest.mark.parametrize("name", INTEGER)
def test_exponents_that_iterations_can_not_do(name: str) -> None:
    with pytest.raises(ValueError, match=f"p must be an integer for {name}.*, got 2.5: use eigh"):
        SOLVERS[name](torch.eye(2), 2.5, 0.0)
    assert SOLVERS[name](torch.eye(2), 2.0, 0.0).converged


def test_pseudo_inverse_takes_no_damping() -> None:
    for epsilon in (1e-3, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="epsilon must be the number 0"):
            pseudo_inverse()(torch.eye(2), 2, epsilon)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "pseudo_inverse"])
def test_epsilon_that_does_not_broadcast(name: str) -> None:
    for A, epsilon in ((torch.eye(2), torch.ones(3)), (torch.ones(2, 2, 2), torch.ones(3))):
        with pytest.raises(ValueError, match="epsilon of shape"):
            SOLVERS[name](A, 2, epsilon)


def test_wrong_factory_arguments() -> None:
    for make, name, value in (
        (by_device, "relative_epsilon", -1e-6),
        (eigh, "relative_epsilon", -1e-6),
        (pseudo_inverse, "rtol", -1e-6),
        (pseudo_inverse, "atol", -1e-6),
        (coupled_newton, "relative_epsilon", -1e-6),
        (coupled_newton, "max_iterations", -1),
        (coupled_newton, "tolerance", -1e-6),
        (coupled_newton, "retries", -1),
        (coupled_newton, "max_residual", -0.1),
        (newton_schulz, "relative_epsilon", float("nan")),
        (newton_schulz, "condition", 0.5),
        (newton_schulz, "tolerance", 0.0),
        (newton_schulz, "max_residual", -0.1),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
            make(**{name: value})  # type: ignore[arg-type]
    for solver in (
        by_device,
        eigh,
        pseudo_inverse,
        coupled_newton,
        coupled_higher_order,
        newton_schulz,
    ):
        for name in solver.least:
            with pytest.raises(TypeError, match=f"{name} is 'x'; expected an? "):
                solver(**{name: "x"})  # type: ignore[arg-type]
    for make in (coupled_newton, coupled_higher_order):
        with pytest.raises(TypeError, match="max_iterations is 2.0; expected an int"):
            make(max_iterations=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="condition is inf"):
        newton_schulz(condition=float("inf"))  # whose steps had no end
    assert newton_schulz(condition=1.7e308)(torch.eye(4), 4).converged
