"""A solver is a value: it survives pickling, equals its like, and can be a key."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from funshampoo import chain, kronecker_statistics, root_inverse
from funshampoo.linalg import (
    InverseRoot,
    RootSolver,
    Solver,
    by_device,
    coupled_higher_order,
    coupled_newton,
    eigh,
    newton_schulz,
    pseudo_inverse,
)

from .spectra import log_spaced, orthogonal, with_spectrum

MAKERS: dict[str, Callable[..., Solver]] = {
    "by_device": by_device,
    "eigh": eigh,
    "pseudo_inverse": pseudo_inverse,
    "coupled_newton": coupled_newton,
    "coupled_higher_order": coupled_higher_order,
    "newton_schulz": newton_schulz,
}
ANOTHER: dict[str, dict[str, float]] = {
    "by_device": {"relative_epsilon": 1e-3},
    "eigh": {"relative_epsilon": 1e-3},
    "pseudo_inverse": {"rtol": 1e-3},
    "coupled_newton": {"retries": 1},
    "coupled_higher_order": {"order": 4},
    "newton_schulz": {"condition": 1e5},
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_pickled_solver_is_the_same_solver(name: str) -> None:
    solver = MAKERS[name](**ANOTHER[name])
    copy = pickle.loads(pickle.dumps(solver))
    assert copy == solver
    assert hash(copy) == hash(solver)
    A = with_spectrum(orthogonal(8), log_spaced(8, 1e2), torch.float32)
    for x, y in zip(copy(A, 4, 0.0), solver(A, 4, 0.0), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("name", MAKERS)
def test_solvers_are_equal_where_their_numbers_are(name: str) -> None:
    make = MAKERS[name]
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(**ANOTHER[name])
    assert all(make() != other() for other in MAKERS.values() if other is not make)


@pytest.mark.parametrize("make", [by_device, eigh, coupled_newton, newton_schulz])
def test_a_tensor_equals_itself_alone(make: Callable[..., Solver]) -> None:
    epsilon = torch.tensor([0.1, 0.2])
    assert make(relative_epsilon=epsilon) == make(relative_epsilon=epsilon)
    assert hash(make(relative_epsilon=epsilon)) == hash(make(relative_epsilon=epsilon))
    assert make(relative_epsilon=epsilon) != make(relative_epsilon=epsilon.clone())


@pytest.mark.parametrize("name", MAKERS)
def test_solvers_are_frozen(name: str) -> None:
    solver = MAKERS[name]()
    (field, *_) = dataclasses.fields(solver)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, field.name, 1.0)


def test_threads_are_for_eigendecompositions() -> None:
    threaded = {name for name, make in MAKERS.items() if make().threaded}  # type: ignore[attr-defined]
    assert threaded == {"by_device", "eigh", "pseudo_inverse"}
    assert all(isinstance(make(), RootSolver) for make in MAKERS.values())


def test_a_function_is_a_solver_too() -> None:
    def halved(A: Tensor, p: float, epsilon: float | Tensor) -> InverseRoot:
        found = eigh(relative_epsilon=1e-6)(A, p, epsilon)
        return found._replace(root=found.root / 2)

    params = {"w": torch.zeros(3, 2)}
    gradients = [{"w": torch.randn(3, 2)} for _ in range(4)]

    def last(solver: Solver | None) -> Tensor:
        tx = chain(kronecker_statistics(1.0), root_inverse(every=2, solver=solver))
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update(g, state)
        found: Tensor = updates["w"]
        return found

    torch.testing.assert_close(last(halved), last(None) / 4)
