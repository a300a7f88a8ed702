"""Statistics, roots and steps are those of full float32, whatever precision the process is set to.

A CPU shows it to the last bit where it has other kernels for another precision. Any machine shows
what the setting is while products are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.core.precision import products_are_rounded
from funshampoo.linalg import (
    InverseRoot,
    Solver,
    by_device,
    coupled_higher_order,
    coupled_newton,
    eigh,
    newton_schulz,
    pseudo_inverse,
)
from funshampoo.linalg.eigensolver import EigenSolver
from tests.trees import tensors

from .spectra import log_spaced, orthogonal, with_spectrum

SOLVERS: dict[str, Solver] = {
    "by_device": by_device(),
    "eigh": eigh(relative_epsilon=1e-6),
    "pseudo_inverse": pseudo_inverse(),
    "coupled_newton": coupled_newton(),
    "coupled_higher_order": coupled_higher_order(),
    "newton_schulz": newton_schulz(),
}


@pytest.fixture(autouse=True)
def highest() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


class Watch(TorchDispatchMode):
    """How many products there were, and how many of them while products are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.rounded = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(op) for name in ("aten.mm", "aten.bmm", "aten.baddbmm", "aten.addmm")):
            self.products += 1
            self.rounded += products_are_rounded()
        return op(*args, **(kwargs or {}))


def at(precision: str, f: Callable[[], Any]) -> list[Tensor]:
    """What f finds with this precision set, which is set afterwards too."""
    torch.set_float32_matmul_precision(precision)
    found = tensors(f())
    assert torch.get_float32_matmul_precision() == precision
    return found


def assert_unmoved(f: Callable[[], Any]) -> None:
    expected = at("highest", f)
    for precision in ("high", "medium"):
        for x, y in zip(at(precision, f), expected, strict=True):
            assert x.equal(y)
    torch.set_float32_matmul_precision("medium")
    with Watch() as watch:
        f()
    assert watch.products
    assert not watch.rounded


def stack(d: int = 256, count: int = 2) -> Tensor:
    return with_spectrum(orthogonal(d, count), log_spaced(d, 1e4), torch.float32)


def test_this_file_shows_something() -> None:
    A = stack()
    full, other = (at(precision, lambda: A @ A.mT)[0] for precision in ("highest", "medium"))
    if full.equal(other):
        pytest.skip("this machine has no other kernels for float32 products")
    with Watch() as watch:
        A @ A.mT
    assert watch.products == watch.rounded == 1


LONG = {"coupled_higher_order": pytest.mark.slow}  # takes as long as all others


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, ())) for n in SOLVERS])
def test_roots(name: str) -> None:
    A = stack()
    assert_unmoved(lambda: SOLVERS[name](A, 4, 0.0))


@pytest.mark.parametrize("name", ["eigh", "pseudo_inverse"])
def test_roots_in_an_old_basis(name: str) -> None:
    solver, A = SOLVERS[name], stack()
    assert isinstance(solver, EigenSolver)
    Q = torch.linalg.eigh(A)[1]
    turned = Q.roll(1, 0)  # the second matrix's basis for the first: that one is decomposed
    for basis in (Q, turned):
        assert_unmoved(lambda basis=basis: solver.near_basis(A, 4, 0.0, basis, 0.1))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["eigh", "pseudo_inverse"])
def test_gradients_of_eigendecompositions(name: str) -> None:
    A = stack().requires_grad_()

    def gradient() -> tuple[Tensor, ...]:
        root = SOLVERS[name](A, 4, 0.0).root
        return torch.autograd.grad(root.square().sum(), A)

    assert_unmoved(gradient)


@pytest.mark.parametrize("shape", [(10, 9, 9), (2, 256, 300), (4, 64, 3, 64)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_factor_matrices(shape: tuple[int, ...], packed: bool) -> None:
    tx = fs.blocked(fs.kronecker_statistics(0.9, packed=packed), 512)
    g = {str(i): x for i, x in enumerate(torch.randn(shape))}
    state = tx.init(g)
    assert_unmoved(lambda: tx.update(g, state)[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": newton_schulz()},
        {"solver": coupled_newton()},
        {"solver": eigh(relative_epsilon=1e-6), "stagger": True, "every": 2},
    ],
    ids=str,
)
def test_steps(options: dict[str, Any]) -> None:
    tx = fs.shampoo(1e-3, max_size=256, **{"every": 1, **options})
    params = {"w": torch.randn(256, 512), "c": torch.randn(9, 18), "b": torch.randn(70)}
    gradients = [{k: torch.randn_like(x) for k, x in params.items()} for _ in range(3)]

    def steps() -> Any:
        p, state = params, tx.init(params)
        for g in gradients:
            updates, state = tx.update(g, state, p)
            p = fs.apply_updates(p, updates)
        return p, state

    assert_unmoved(steps)


def test_an_exception_leaves_the_setting_alone() -> None:
    def raising(A: Tensor, p: float, epsilon: float | Tensor) -> InverseRoot:
        assert not products_are_rounded()
        raise ZeroDivisionError

    tx = fs.chain(fs.kronecker_statistics(), fs.root_inverse(solver=raising))
    g = {"w": torch.randn(4, 3)}
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ZeroDivisionError):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match="p must be an integer"):
        newton_schulz()(stack(4), 2.5, 0.0)
    assert torch.get_float32_matmul_precision() == "medium"
