"""A rule, or a solver of a user's, that raises as torch.linalg does: for all because of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import funshampoo as fs
from funshampoo import linalg
from funshampoo.state import find_state
from funshampoo.state.stages import RefreshedState
from tests.refresh.clients import in_eigenbasis, kl_shampoo
from tests.trees import assert_close, assert_equal

PARAMS = {"w": torch.zeros(4, 12, dtype=torch.float64)}  # three blocks
GRADS = [torch.randn(4, 12, generator=torch.Generator().manual_seed(t)).double() for t in range(4)]
LIKE_LAPACK = torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite.")


def by_cholesky(A: Tensor, p: float, epsilon: Any = 0.0) -> linalg.InverseRoot:
    """A solver that looks whether the matrices are definite, as nobody should."""
    damped = A + 1e-3 * torch.eye(A.shape[-1], dtype=A.dtype)
    torch.linalg.cholesky(damped)
    return linalg.eigh()(damped, p, 0.0)


def soap() -> fs.GradientTransformation:
    inner = fs.scale_by_adam(0.9, 0.95, 1e-3)
    return fs.chain(fs.kronecker_statistics(0.9), in_eigenbasis(inner, 1))


def shampoo(**options: Any) -> fs.GradientTransformation:
    return fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(1, **options))


METHODS = {
    "soap": (soap, "eigh", "qr"),
    "kl": (lambda: kl_shampoo(0.9, 1), "eigh"),
    "cholesky": (lambda: shampoo(solver=by_cholesky), "cholesky"),
    "cholesky:packed": (lambda: shampoo(solver=by_cholesky, packed=True), "cholesky"),
    "cholesky:staggered": (lambda: shampoo(solver=by_cholesky, stagger=True), "cholesky"),
}


def fail_on(patch: pytest.MonkeyPatch, function: str, bad: Tensor, error: Exception) -> None:
    original = getattr(torch.linalg, function)

    def failing(A: Tensor) -> Any:
        if bool((A - bad).abs().flatten(-2).amax(-1).eq(0).any()):
            raise error
        return original(A)

    patch.setattr(torch.linalg, function, failing)


def asked_last(patch: pytest.MonkeyPatch, function: str, tx: Any) -> list[Tensor]:
    """What this function of torch.linalg is asked for on the last step, matrix by matrix."""
    asked: list[Tensor] = []
    original = getattr(torch.linalg, function)
    state, params = tx.init(PARAMS), PARAMS
    for g in GRADS[:-1]:
        _, state = tx.update({"w": g}, state, params)

    def recording(A: Tensor) -> Any:
        asked.extend(A.reshape(-1, *A.shape[-2:]))
        return original(A)

    patch.setattr(torch.linalg, function, recording)
    tx.update({"w": GRADS[-1]}, state, params)
    patch.undo()
    return asked


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_a_failed_refresh_of_that_matrix_alone(
    name: str, donate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, *functions = METHODS[name]
    for function in functions:
        tx = fs.blocked(make(), 4)
        asked = asked_last(monkeypatch, function, tx)
        for bad in (asked[0], asked[-1]):
            found, expected = [], []
            for out in (found, expected):
                with monkeypatch.context() as patch:
                    state = tx.init(PARAMS)
                    for t, g in enumerate(GRADS):
                        old = [kept.rounds.clone() for kept in every_kept(state)]
                        if t == len(GRADS) - 1 and out is found:
                            fail_on(patch, function, bad, LIKE_LAPACK)
                        _, state = tx.update({"w": g}, state, PARAMS, donate=donate)
                    out += every_kept(state)
            failures = torch.stack([kept.failures for kept in found])
            assert failures.sum() == 1
            for now, fine, rounds in zip(found, expected, old, strict=True):
                failed = now.failures > 0
                assert_close(now.value[0][~failed], fine.value[0][~failed], 1e-12)
                assert_equal(now.rounds[failed], rounds[failed])
                assert all(x.isfinite().all() for x in now.value)


def every_kept(state: Any) -> list[Any]:
    found = find_state(state, RefreshedState)
    assert found is not None
    return list(found.kept["4x4"])


def test_outside_blocks_and_in_an_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix has no others beside it; a batch of vmap fails as a whole."""

    def failing(A: Tensor) -> Any:
        raise LIKE_LAPACK

    tx = shampoo(solver=by_cholesky)
    monkeypatch.setattr(torch.linalg, "cholesky", failing)
    updates, state = tx.update({"w": GRADS[0]}, tx.init(PARAMS))
    assert torch.equal(updates["w"], GRADS[0])
    assert [int(kept.failures) for kept in state["root_inverse"].kept["w"]] == [1, 1]
    both = {"w": torch.stack(GRADS[:2])}
    updates, state = vmap(tx.update)(both, vmap(tx.init)(both))
    assert torch.equal(updates["w"], both["w"])
    assert all(kept.failures.tolist() == [1, 1] for kept in state["root_inverse"].kept["w"])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 3x4)"),
        ValueError("a mistake"),
        TypeError("a mistake"),
        torch.OutOfMemoryError("CUDA out of memory."),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_of_a_users_are_raised(error: BaseException) -> None:
    def solver(A: Tensor, p: float, epsilon: Any = 0.0) -> linalg.InverseRoot:
        raise error

    tx = fs.blocked(shampoo(solver=solver), 4)
    with pytest.raises(type(error)):
        tx.update({"w": GRADS[0]}, tx.init(PARAMS))
