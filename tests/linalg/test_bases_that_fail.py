"""A QR that fails, or returns no orthogonal matrix, is a failed refresh of its block alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from funshampoo import eigenvalue_shampoo, kl_shampoo, kl_soap, soap, soap_muon
from funshampoo.linalg import orthogonal_iteration, qr
from funshampoo.linalg.estimates import is_orthogonal
from funshampoo.state import state_dict

from .spectra import DTYPES, log_spaced, orthogonal, with_spectrum
from .test_failures import INTERNAL

REAL = torch.linalg.qr
BASES = {"qr": qr(), "orthogonal_iteration": orthogonal_iteration(sort=True, steps=2)}
GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a multiple": lambda Q: 3 * Q,
    "shifted": lambda Q: Q + 0.5,
    "one column again": lambda Q: torch.cat([Q[..., -1:], Q[..., 1:]], -1),
    "NaN": lambda Q: Q * torch.nan,
    "zeros": torch.zeros_like,
}
RAISED = {
    "LinAlgError": torch.linalg.LinAlgError("did not converge"),  # type: ignore[attr-defined]
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
    "internal": INTERNAL,
    "ValueError": ValueError("a wrapper's"),
    "IndexError": IndexError("a wrapper's"),
}
ANSWERS: dict[str, Callable[[Tensor], Tensor] | Exception] = {**GARBAGE, **RAISED}
RECIPES: dict[str, Any] = {
    "soap": soap,
    "kl_shampoo": kl_shampoo,
    "kl_soap": kl_soap,
    "soap_muon": soap_muon,
    "eigenvalue_shampoo": lambda rate, every: eigenvalue_shampoo(rate, every=every, basis=qr()),
}


def failing(
    fails: Callable[[Tensor], bool], answer: Callable[[Tensor], Tensor] | Exception
) -> Callable[..., Any]:
    """torch.linalg.qr that does this where `fails`, and is itself elsewhere."""

    def patched(Y: Tensor) -> tuple[Tensor, Tensor]:
        if not fails(Y):
            found: tuple[Tensor, Tensor] = REAL(Y)
            return found
        if isinstance(answer, Exception):
            raise answer
        Q, R = REAL(Y)
        return answer(Q), R

    return patched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", [*GARBAGE, *RAISED])
@pytest.mark.parametrize("name", BASES)
def test_the_others_of_a_stack_are_found(
    name: str, reason: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = with_spectrum(orthogonal(8, 4), log_spaced(8, 1e2), dtype)
    old, first = orthogonal(8, 4).to(dtype), torch.zeros(4, dtype=torch.bool)
    before, known = BASES[name](A, old, first)
    assert known.all()
    assert is_orthogonal(before).all()
    asked: list[Tensor] = []
    monkeypatch.setattr(torch.linalg, "qr", lambda Y: (asked.append(Y), REAL(Y))[1])
    BASES[name](A, old, first)
    monkeypatch.setattr(torch.linalg, "qr", failing(asked[1].equal, ANSWERS[reason]))
    after, found = BASES[name](A, old, first)
    assert found.tolist() == [True, False, True, True]
    others = torch.tensor([0, 2, 3])
    assert after[others].equal(before[others])


@pytest.mark.parametrize("reason", ["shifted", "cuSOLVER", "ValueError"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_in_the_bases_it_has(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"w": torch.ones(6, 5), "v": torch.ones(4, 3)}
    tx = RECIPES[name](0.01, every=2)
    state = tx.init(params)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        if step == 3:
            monkeypatch.setattr(
                torch.linalg, "qr", failing(lambda Y: Y.shape[-1] == 6, ANSWERS[reason])
            )
        grads = {k: torch.randn(p.shape, generator=generator) for k, p in params.items()}
        updates, state = tx.update(grads, state, params)
        assert all(u.isfinite().all() and u.abs().max() < 1 for u in updates.values())
    failures = [int(x.sum()) for name, x in state_dict(state).items() if name.endswith("failures")]
    refreshes = [t for t in (3, 4, 5) if "refresh" in tx.phase(t)]
    assert sum(failures) == len(refreshes) > 0, "of one side"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), TypeError("of the call")])
def test_an_error_of_the_call_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    A = with_spectrum(orthogonal(8, 2), log_spaced(8, 1e2), torch.float32)

    def broken(Y: Tensor) -> Any:
        raise error

    monkeypatch.setattr(torch.linalg, "qr", broken)
    with pytest.raises(type(error)):
        qr()(A, torch.eye(8).expand(2, 8, 8), torch.zeros(2, dtype=torch.bool))
