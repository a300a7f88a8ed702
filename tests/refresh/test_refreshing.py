"""The mechanism through three stages: SOAP, KL-Shampoo and root_inverse.

Against plain loops over blocks in float64, and against themselves in other forms: donated,
staggered, batched, compiled, resumed.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import vmap

import funshampoo as fs
from funshampoo.refresh import RefreshSchedule
from funshampoo.refresh.rule import Found
from funshampoo.refresh.turns import phase
from funshampoo.state import Kept, RefreshedState, find_state
from tests.refresh.clients import Basis
from tests.refresh.methods import (
    EVERY,
    METHODS,
    SHAPES,
    START,
    STEPS,
    D,
    every_method,
    gradient,
    run,
    shampoo,
    soap,
)
from tests.releases import wrong_before
from tests.sooner import these
from tests.test_position import one_thread
from tests.trees import assert_close, assert_equal, tensors

__all__ = ["one_thread"]  # a fixture, for all tests here

# Plain loops, over one block of any order


def unfolded(g: Tensor, side: int) -> Tensor:
    return g.movedim(side, 0).reshape(g.shape[side], -1)


def product(g: Tensor, side: int, matrix: Tensor) -> Tensor:
    return torch.tensordot(matrix, g, ([1], [side])).movedim(0, side)


def products(g: Tensor, matrices: list[Tensor]) -> Tensor:
    for side, matrix in enumerate(matrices):
        g = product(g, side, matrix)
    return g


def plain_soap(grads: list[Tensor | None], due: Callable[[int], bool]) -> list[Tensor | None]:
    """As the paper has it: bases sorted by what they find, and Adam's moments with them."""
    shape = next(g for g in grads if g is not None).shape
    L = [torch.zeros(d, d, dtype=D) for d in shape]
    Q = [torch.eye(d, dtype=D) for d in shape]
    M, V, seen, refreshed, out = torch.zeros(shape, dtype=D), torch.zeros(shape, dtype=D), 0, 0, []
    for t, g in enumerate(grads, start=1):
        if g is None:
            out.append(None)
            continue
        seen += 1
        L = [0.9 * L[i] + 0.1 * unfolded(g, i) @ unfolded(g, i).T for i in range(len(shape))]
        if due(t):
            for i, A in enumerate(L):
                if not refreshed:
                    Q[i] = torch.linalg.eigh(A)[1].flip(-1)
                    continue
                order = (Q[i].T @ A @ Q[i]).diagonal().argsort(descending=True)
                M, V = M.index_select(i, order), V.index_select(i, order)
                Q[i] = torch.linalg.qr(A @ Q[i][:, order])[0]
            refreshed += 1
        R = products(g, [q.T for q in Q])
        M, V = 0.9 * M + 0.1 * R, 0.95 * V + 0.05 * R**2
        step = (M / (1 - 0.9**seen)) / ((V / (1 - 0.95**seen)).sqrt() + 1e-3)
        out.append(products(step, Q))
    return out


def plain_kl(grads: list[Tensor | None], due: Callable[[int], bool]) -> list[Tensor | None]:
    shape = next(g for g in grads if g is not None).shape
    L = [torch.zeros(d, d, dtype=D) for d in shape]
    X = [torch.eye(d, dtype=D) for d in shape]
    seen, out = 0, []
    for t, g in enumerate(grads, start=1):
        if g is None:
            out.append(None)
            continue
        seen += 1
        for i, d in enumerate(shape):
            others = [torch.eye(len(x), dtype=D) if j == i else x for j, x in enumerate(X)]
            white = unfolded(products(g, others), i)
            L[i] = 0.9 * L[i] + 0.1 * white @ white.T * d / math.prod(shape)
        if due(t):
            for i, A in enumerate(L):
                values, Q = torch.linalg.eigh(A / (1 - 0.9**seen))
                X[i] = Q @ (values + 1e-6 * values.max()).rsqrt().diag() @ Q.T
        out.append(products(g, X))
    return out


PLAIN = {"soap": plain_soap, "kl": plain_kl}


def by_schedule(t: int) -> bool:
    return fs.refresh_due(t, EVERY, START)


@pytest.mark.parametrize("method", PLAIN)
def test_a_tree_of_any_orders_against_plain_loops(method: str) -> None:
    """One parameter's gradients begin late, after a refresh that it had no part in."""
    grads = [gradient(t, w=START + 1) for t in range(1, STEPS + 1)]
    found, state = run(METHODS[method](), grads)
    for name in SHAPES:
        expected = PLAIN[method]([g[name] for g in grads], by_schedule)
        for mine, plain in zip(found, expected):
            if plain is None:
                assert mine[name] is None
            else:
                assert torch.allclose(mine[name], plain, rtol=1e-8, atol=1e-9), name
    kept = find_state(state, RefreshedState).kept  # type: ignore[union-attr]
    assert [int(side.rounds) for side in kept["m"]] == [5, 5]
    assert [int(side.rounds) for side in kept["w"]] == [4, 4]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("method", PLAIN)
def test_stacks_against_plain_loops(method: str, stagger: bool) -> None:
    N = 4
    shapes = {"6x5": (N, 6, 5), "5": (N, 5)}
    ids = {"6x5": range(N), "5": range(N, 2 * N)}
    tx = METHODS[method](stagger=stagger)
    grads = [gradient(t, shapes) for t in range(1, STEPS + 1)]
    state, found = tx.init(grads[0], block_ndim=1), []
    for g in grads:
        u, state = tx.update(g, state, block_ndim=1, gradient=g, rows=ids, donate=True)
        found.append(u)
    for stack, row in itertools.product(shapes, range(N)):

        def due(t: int, number: int = ids[stack][row]) -> bool:
            turn = t > START and t % EVERY == phase(number, EVERY)
            return t == START or turn if stagger else by_schedule(t)

        expected = PLAIN[method]([g[stack][row] for g in grads], due)
        for mine, plain in zip(found, expected):
            assert plain is not None
            assert torch.allclose(mine[stack][row], plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("blocked", these([False, True], sooner=[True]))
@every_method
def test_donated_is_pure(method: str, blocked: bool) -> None:
    """To the last bit, also where gradients are missing and turns are spread."""
    grads = [gradient(t, m=2 if t < 3 else 0, v=9) for t in range(1, STEPS + 1)]
    for stagger in (False, True):
        tx = METHODS[method](stagger=stagger, start=1)
        tx = fs.blocked(tx, max_size=3) if blocked else tx
        assert_equal(run(tx, grads, donate=True), run(tx, grads))


@every_method
def test_an_ensemble_is_a_loop(method: str) -> None:
    tx = fs.blocked(METHODS[method](), max_size=3)
    many = [gradient(t, {k: (3, *shape) for k, shape in SHAPES.items()}) for t in range(1, 13)]
    params = {k: torch.zeros(3, *shape, dtype=D) for k, shape in SHAPES.items()}
    state = vmap(tx.init)(params)
    for g in many:
        updates, state = vmap(tx.update)(g, state, params)
    for member in range(3):
        alone, _ = run(tx, [{k: x[member] for k, x in g.items()} for g in many])
        assert_close({k: x[member] for k, x in updates.items()}, alone[-1], 1e-8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo cannot trace optree")  # 2.8
@every_method
def test_two_graphs(method: str) -> None:
    """The first refresh is one of them: `rounds` says that it is the first, not the step."""
    torch._dynamo.reset()
    counter = CompileCounter()
    tx = fs.blocked(METHODS[method](), max_size=3)
    graph = torch.compile(tx.update, fullgraph=True, backend=counter)
    params = gradient(0)
    state, other = tx.init(params), tx.init(params)
    for t in range(1, 14):
        context = {"refresh": by_schedule(t)}
        mine, state = graph(gradient(t), state, params, **context)
        expected, other = tx.update(gradient(t), other, params, **context)
        assert_close(mine, expected, 1e-8)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_graph_has_to_be_told_whether_to_refresh() -> None:
    wrong_before("2.13", "an error raised in a graph breaks it, and torch goes on without one")
    torch._dynamo.reset()
    tx, params = fs.blocked(METHODS["shampoo"](), max_size=3), gradient(0)
    with pytest.raises(RuntimeError, match="can't be read inside torch.compile"):
        torch.compile(tx.update, backend="eager")(gradient(1), tx.init(params), params)


@every_method
def test_a_checkpoint_resumes_exactly_and_reports_read_it(method: str) -> None:
    tx = fs.blocked(
        fs.guarded(METHODS[method](packed=True) if method == "newton" else METHODS[method]()), 3
    )
    grads = [gradient(t) for t in range(1, STEPS + 1)]
    history, _ = run(tx, grads)
    params = {k: torch.zeros(shape, dtype=D) for k, shape in SHAPES.items()}
    _, state = run(tx, grads[:8])
    saved = fs.state.state_dict(state)
    stage = {"soap": "in_eigenbasis/ineigenbasis/bases", "kl": "kl_shampoo/roots"}.get(
        method, "root_inverse"
    )
    assert f"m/block_0_0/{stage}/kept/1/value/0" in saved
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    state = fs.state.load_state_dict(tx.init(params), torch.load(file, weights_only=True)).state
    for g, expected in zip(grads[8:], history[8:]):
        updates, state = tx.update(g, state, params)
        assert_equal(updates, expected)
    report = fs.state.health(state, file=io.StringIO())
    assert report.steps == STEPS
    assert {f.where for f in report.factors} >= {"3x3 side 0", "3x3 side 1", "3 side 0"}
    assert not any(f.failures for f in report.factors)
    memory = fs.state.summary(state, file=io.StringIO())
    assert memory.total == sum(x.numel() * x.element_size() for x in tensors(state))


def test_outside_blocks_names_and_places_are_the_parameters() -> None:
    _, state = run(shampoo(basis_tolerance=0.3), [gradient(1)])
    saved = fs.state.state_dict(state)
    assert {"m/root_inverse/kept/1/value/0", "m/root_inverse/kept/1/value/1"} <= saved.keys()
    assert set(fs.state.summary(state, file=io.StringIO()).parameters) == {*SHAPES, "(shared)"}


def test_failures_of_any_rule_stop_the_training_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Basis.__call__

    def failing(self: Any, A: Tensor, old: Any, rounds: Tensor) -> Found:
        found = original(self, A, old, rounds)
        return found._replace(converged=found.converged & (A[..., 0, 0] < 1e3))

    monkeypatch.setattr(Basis, "__call__", failing)
    tx = fs.blocked(fs.guarded(soap(every=1, start=1), max_failures=2, every=1), 3)
    params = gradient(0)
    state = tx.init(params)
    for t in range(1, 3):
        g = gradient(t)
        g["m"][0, 0] = 1e3
        _, state = tx.update(g, state, params)
    rounds = [kept.rounds.tolist() for kept in kept_in(state)]
    assert 0 in itertools.chain(*rounds)
    assert 2 in itertools.chain(*rounds)
    with pytest.raises(fs.FailureLimitError, match="m block_0_0: refresh of its statistics failed"):
        tx.update(gradient(3), state, params)


def kept_in(state: Any) -> list[Kept]:
    if isinstance(state, Kept):
        return [state]
    children: Any = state.values() if isinstance(state, dict) else state
    if not isinstance(state, (dict, tuple)):
        return []
    return [kept for child in children for kept in kept_in(child)]


def test_a_matrix_of_zeros_keeps_the_old_value_and_is_no_round() -> None:
    g = gradient(1)
    g["m"].zero_()
    _, state = run(shampoo(start=1), [g])
    for side in state["root_inverse"].kept["m"]:
        assert int(side.rounds) == int(side.failures) == int(side.streak) == 0
        assert torch.equal(side.value[0], torch.eye(len(side.value[0]), dtype=D))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (RefreshSchedule(4), [1, 4, 8, 12]),
        (RefreshSchedule(4, start=6), [6, 8, 12]),
        (RefreshSchedule(4, start=1, offset=1), [1, 5, 9, 13]),
        (RefreshSchedule(4, start=3, offset=3), [3, 7, 11]),
        (RefreshSchedule(4, start=11, stagger=True), [11, 12, 13]),
    ],
)
def test_on_which_steps_there_are_refreshes(schedule: RefreshSchedule, expected: list[int]) -> None:
    assert [t for t in range(1, 14) if schedule.happens_at(t)] == expected


ROOTS: dict[str, fs.GradientTransformation] = {
    "eigh": fs.root_inverse(solver=fs.linalg.eigh(relative_epsilon=1e-6)),
    "pseudo_inverse": fs.root_inverse(solver=fs.linalg.pseudo_inverse()),
    "newton_schulz": fs.root_inverse(solver=fs.linalg.newton_schulz()),
    "coupled_newton": fs.root_inverse(solver=fs.linalg.coupled_newton()),
    "in an old basis": fs.root_inverse(basis_tolerance=0.1),
    "in_eigenbasis": fs.in_eigenbasis(fs.scale_by_adam(0.9, 0.9)),
}


@pytest.mark.parametrize("name", these([*ROOTS], sooner={"eigh", "in_eigenbasis"}))
def test_gradients_that_become_zeros_fail_no_refresh(name: str) -> None:
    """Statistics decay to denormal numbers and stay there: the last value is kept, uncounted."""
    tx = fs.guarded(fs.chain(fs.kronecker_statistics(0.9), ROOTS[name]), max_failures=1)
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.zeros(4, 3)}
    state = tx.init(params)
    for t in range(1200):
        g = torch.randn(4, 3, generator=generator) * (t < 20)
        _, state = tx.update({"w": g}, state, params, donate=True)
    statistics = find_state(state, fs.state.KroneckerState)
    largest = statistics.factors["w"][0].abs().max()
    assert 0 < largest < torch.finfo(torch.float32).tiny
    for kept in find_state(state, RefreshedState).kept["w"]:
        assert kept.failures == 0
        assert kept.value[0].isfinite().all()
    updates, state = tx.update({"w": torch.ones(4, 3)}, state, params)
    assert updates["w"].isfinite().all()
    tx.update({"w": torch.ones(4, 3)}, state, params, refresh=True)
