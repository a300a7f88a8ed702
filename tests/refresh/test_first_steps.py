"""in_eigenbasis from its first step on: skipped, in the identity, or in its own bases."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg

D = torch.float64
SHAPE, STEPS, BETA = (4, 5), 9, 0.8


def gradient(t: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(SHAPE, generator=generator, dtype=D) * (1 + torch.arange(5, dtype=D))


def plain(first: str, before: bool, every: int, start: int) -> list[torch.Tensor]:
    """Momentum and signs in eigenbases, in plain lines: signs know no order of the columns."""
    L, R, Q, P = torch.zeros(4, 4), torch.zeros(5, 5), torch.eye(4), torch.eye(5)
    L, R, Q, P = (x.to(D) for x in (L, R, Q, P))
    B = torch.zeros(SHAPE, dtype=D)  # momentum, here in the frame of the parameters
    found = []
    for t in range(1, STEPS + 1):
        g = gradient(t)
        L, R = BETA * L + (1 - BETA) * g @ g.T, BETA * R + (1 - BETA) * g.T @ g
        due = t == start or (t > start and t % every == 0)
        if before and due:
            Q, P = torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1]
        if first == "identity" or t > 1:
            B = 0.5 * B + g
            found.append(Q @ (Q.T @ B @ P).sign() @ P.T)
        else:
            found.append(torch.zeros(SHAPE, dtype=D))
        if not before and due:
            Q, P = torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1]
    return found


CASES = [
    (first, before, every, start)
    for first in ("skip", "identity")
    for before in (False, True)
    for every, start in ((1, 1), (3, 2), (2, 4))
    # in bases of itself a gradient is diagonal up to rounding, of which signs would be taken
    if not (start == 1 and before and first == "identity")
]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("basis", [linalg.eigh(), linalg.by_rank()])
@pytest.mark.parametrize(("first", "before", "every", "start"), CASES)
def test_when_bases_come_and_when_they_are_used(
    first: Any, before: bool, every: int, start: int, basis: Any, donate: bool
) -> None:
    tx = fs.chain(
        fs.kronecker_statistics(BETA),
        fs.in_eigenbasis(
            fs.chain(fs.trace(0.5), fs.sign()),
            every,
            start=start,
            basis=basis,
            first=first,
            renew_before_use=before,
        ),
    )
    state = tx.init({"w": torch.zeros(SHAPE, dtype=D)})
    for t, expected in enumerate(plain(first, before, every, start), start=1):
        updates, state = tx.update({"w": gradient(t)}, state, donate=donate)
        assert torch.allclose(updates["w"], expected, rtol=0, atol=1e-8), t


def noted(counts: list[int], count: torch.Tensor) -> float:
    """A schedule that remembers what it was asked for."""
    counts.append(int(count))
    return 1.0


@pytest.mark.parametrize("donate", [False, True])
def test_a_schedule_inside_counts_the_same_steps_in_either_order(donate: bool) -> None:
    for before in (False, True):
        counts: list[int] = []
        rate = functools.partial(noted, counts)
        inner = fs.in_eigenbasis(
            fs.scale_by_learning_rate(rate), 1, first="identity", renew_before_use=before
        )
        statistics = fs.kronecker_statistics(0.9)
        params = {"w": torch.zeros(SHAPE, dtype=D)}
        factors = statistics.init(params)
        state = inner.init(params, upstream=(factors,))
        for t in range(1, 4):
            _, factors = statistics.update({"w": gradient(t)}, factors)
            context = {"upstream": (factors,), "donate": donate}
            _, state = inner.update({"w": gradient(t)}, state, **context)
        assert counts == [0, 1, 2]


def test_by_rank_second_moments_belong_to_ranks_and_with_eigh_to_directions() -> None:
    """The larger of two eigenvalues changes its direction: V stays or goes with it."""
    first, then = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 300.0]))
    seconds = {}
    for name, basis in (("direction", linalg.eigh()), ("rank", linalg.by_rank())):
        tx = fs.chain(
            fs.kronecker_statistics(0.5),
            fs.in_eigenbasis(
                fs.scale_by_rms(0.0), 1, basis=basis, first="identity", renew_before_use=True
            ),
        )
        state = tx.init({"w": first})
        _, state = tx.update({"w": first}, state)
        before = state["in_eigenbasis"].bases.kept["w"][0].value[0].abs()
        _, state = tx.update({"w": then}, state)
        after = state["in_eigenbasis"].bases.kept["w"][0].value[0].abs()
        seconds[name] = torch.equal(before, after)
    assert seconds == {"direction": True, "rank": False}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"first": "none"}, ValueError, "first is 'none'; choose one of 'skip', 'identity'"),
        ({"renew_before_use": 1}, TypeError, "renew_before_use is 1"),
        ({"basis": 3}, TypeError, r"give linalg.qr\(\), linalg.eigh\(\) or linalg.by_rank\(\)"),
    ],
)
def test_bad_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fs.in_eigenbasis(fs.scale_by_adam(), **options)
