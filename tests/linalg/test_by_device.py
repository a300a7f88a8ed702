"""Products where a GPU would have to decompose, eigendecompositions elsewhere."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from funshampoo import root_inverse
from funshampoo.linalg import InverseRoot, Solver, by_device, eigh, newton_schulz
from funshampoo.linalg.by_device import LARGEST_SIDE_OF_EIGH

from .spectra import log_spaced, orthogonal, with_spectrum


def stack(d: int) -> Tensor:
    return with_spectrum(orthogonal(d), log_spaced(d, 1e3), torch.float32)


def assert_same(found: InverseRoot, expected: InverseRoot) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.equal(y)


@pytest.fixture
def large_ones_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every matrix were on a GPU."""

    def by_products(self: by_device, A: Tensor) -> bool:
        return A.shape[-1] > LARGEST_SIDE_OF_EIGH

    monkeypatch.setattr(by_device, "_by_products", by_products)


@pytest.mark.parametrize("d", [8, 33])
@pytest.mark.parametrize("p", [2, 2.5, 4.0])
def test_eigh_on_a_cpu(d: int, p: float) -> None:
    found = by_device(relative_epsilon=1e-4)(stack(d), p, 1e-3)
    assert_same(found, eigh(relative_epsilon=1e-4)(stack(d), p, 1e-3))


@pytest.mark.usefixtures("large_ones_by_products")
@pytest.mark.parametrize(
    ("d", "p", "relative_epsilon", "expected"),
    [
        (32, 4, 1e-4, eigh),
        (33, 4, 1e-4, newton_schulz),
        (33, 4.0, 1e-6, newton_schulz),
        (33, 2.5, 1e-4, eigh),
        (33, 4.5, 1e-4, newton_schulz),
        (33, 4, 1e-7, eigh),
        (33, 4, torch.tensor(1e-4), newton_schulz),
    ],
)
def test_products_on_a_gpu(
    d: int, p: float, relative_epsilon: float | Tensor, expected: object
) -> None:
    A = stack(d)
    found = by_device(relative_epsilon=relative_epsilon)(A, p, 1e-3)
    others: dict[object, InverseRoot] = {eigh: eigh(relative_epsilon=relative_epsilon)(A, p, 1e-3)}
    if p != 2.5:
        others[newton_schulz] = newton_schulz(relative_epsilon=relative_epsilon)(A, p, 1e-3)
        assert not others[eigh].root.equal(others[newton_schulz].root)  # else nothing is shown
    assert_same(found, others[expected])


def test_which_matrices_go_by_products() -> None:
    """Those of a GPU, of sides above 32; a tensor may be one without its memory."""
    with FakeTensorMode():
        found = {
            (device, d): by_device()._by_products(torch.empty(2, d, d, device=device))
            for device in ("cpu", "meta", "cuda")
            for d in (LARGEST_SIDE_OF_EIGH, LARGEST_SIDE_OF_EIGH + 1)
        }
    assert [case for case, products in found.items() if products] == [("cuda", 33)]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    for d, solver in ((32, eigh(relative_epsilon=1e-6)), (33, newton_schulz())):
        A = stack(d).cuda()
        assert_same(by_device()(A, 4, 0.0), solver(A, 4, 0.0))


@pytest.mark.parametrize("relative_epsilon", [1e-3, torch.tensor([0.1, 0.2, 0.3])])
def test_pickled(relative_epsilon: float | Tensor) -> None:
    solver: Solver = by_device(relative_epsilon=relative_epsilon)
    copy = pickle.loads(pickle.dumps(solver))
    assert (copy == solver) is isinstance(relative_epsilon, float)
    assert_same(copy(stack(8), 4, 0.0), solver(stack(8), 4, 0.0))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="relative_epsilon is -1.0; it must lie in"):
        by_device(relative_epsilon=-1.0)
    for p in (0, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="p must be"):
            by_device()(stack(8), p, 0.0)
    with pytest.raises(TypeError, match="call it"):
        root_inverse(solver=by_device)  # type: ignore[arg-type]
