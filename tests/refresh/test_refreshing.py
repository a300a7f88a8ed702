"""The mechanism through three stages: SOAP, KL-Shampoo and root_inverse.

Against plain loops over blocks in float64, and against themselves in other forms: donated,
staggered, batched, compiled, resumed.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import vmap

import funshampoo as fs
from funshampoo import linalg
from funshampoo.distributed.cost import DEFAULT_COST
from funshampoo.refresh import solving
from funshampoo.refresh.jobs import Job
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, eigh_seconds, is_same
from funshampoo.refresh.turns import RefreshSchedule, phase
from funshampoo.state import Kept, RefreshedState, find_state
from funshampoo.transforms.root_inverse import RootRule
from tests.refresh.clients import Basis, Root, in_eigenbasis, kl_shampoo
from tests.test_position import one_thread
from tests.trees import assert_close, assert_equal, clone, tensors

__all__ = ["one_thread"]  # a fixture, for all tests here

D = torch.float64
SHAPES = {"m": (6, 5), "t": (3, 2, 4), "v": (5,), "w": (4, 6), "x": (3, 2, 1, 2)}
START, EVERY, STEPS = 6, 3, 18  # by step 6 the statistics have full rank


def gradient(t: int, shapes: Any = SHAPES, **missing: int) -> Any:
    """No gradient for the first steps of those that are `missing`."""
    generator = torch.Generator().manual_seed(t)
    drawn = {k: torch.randn(shape, generator=generator, dtype=D) for k, shape in shapes.items()}
    return {k: None if t <= missing.get(k, -1) else g for k, g in drawn.items()}


def soap(**options: Any) -> fs.GradientTransformation:
    inner = fs.scale_by_adam(0.9, 0.95, 1e-3)
    options = {"every": EVERY, "start": START} | options
    return fs.chain(fs.kronecker_statistics(0.9), in_eigenbasis(inner, **options))


def kl(**options: Any) -> fs.GradientTransformation:
    return fs.chain(kl_shampoo(0.9, **{"every": EVERY, "start": START} | options))


def shampoo(**options: Any) -> fs.GradientTransformation:
    options = {"every": EVERY, "start": START} | options
    solver = linalg.eigh(relative_epsilon=1e-3)
    return fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(solver=solver, **options))


METHODS: dict[str, Callable[..., fs.GradientTransformation]] = {
    "soap": soap,
    "kl": kl,
    "shampoo": shampoo,
    "newton": lambda **options: fs.chain(
        fs.kronecker_statistics(0.9),
        fs.root_inverse(solver=linalg.newton_schulz(), **{"every": EVERY} | options),
    ),
    "adaptive": lambda **options: shampoo(**{"basis_tolerance": 0.3} | options),
}
every_method = pytest.mark.parametrize("method", METHODS)


def run(tx: Any, grads: list[Any], **context: Any) -> tuple[list[Any], Any]:
    params = {k: torch.zeros(shape, dtype=D) for k, shape in SHAPES.items()}
    state, history = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params, **context)
        history.append(clone(updates))
    return history, state


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
        u, state = tx.update(g, state, block_ndim=1, gradient=g, block_ids=ids, donate=True)
        found.append(u)
    for stack, row in itertools.product(shapes, range(N)):

        def due(t: int, number: int = ids[stack][row]) -> bool:
            turn = t > START and t % EVERY == phase(number, EVERY)
            return t == START or turn if stagger else by_schedule(t)

        expected = PLAIN[method]([g[stack][row] for g in grads], due)
        for mine, plain in zip(found, expected):
            assert plain is not None
            assert torch.allclose(mine[stack][row], plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("blocked", [False, True])
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
    with pytest.raises(RuntimeError, match="can't be read inside torch.compile"):
        torch.compile(tx.update, backend="eager")(gradient(1), state, params)


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


# Batches and costs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(side, matrices) of every call of a rule, in one thread."""
    found: list[tuple[int, int]] = []
    original = RootRule.__call__

    def counted(self: Any, A: Tensor, *rest: Any) -> Found:
        found.append((self.side, len(A)))
        return original(self, A, *rest)

    monkeypatch.setattr(RootRule, "__call__", counted)
    return found


STACKS = {"6x5": (3, 6, 5), "5x6": (2, 5, 6), "5": (4, 5), "5x5": (1, 5, 5)}


@pytest.mark.parametrize("options", [{}, {"basis_tolerance": 0.2}, {"packed": True}], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, torch.tensor(1e-3)])
def test_matrices_of_one_side_of_all_stacks_are_one_batch(
    epsilon: Any, options: Any, calls: list[tuple[int, int]]
) -> None:
    """Where nothing else of their rule differs; and each is, to the last bit, what it is alone."""
    tx = shampoo(every=1, start=1, epsilon=epsilon, **options)

    def trained(shapes: Any, **context: Any) -> Any:
        state = tx.init(gradient(0, shapes), block_ndim=1)
        for t in range(1, 4):
            g = {k: v for k, v in gradient(t, STACKS).items() if k in shapes}
            updates, state = tx.update(g, state, block_ndim=1, **context)
        return updates, state["root_inverse"].kept

    together, kept = trained(STACKS)
    assert sorted(calls) == sorted(3 * [(5, 3 + 2 + 2 * 1), (5, 4), (6, 5)])  # a vector's: A^(-1/2)
    for stack, shape in STACKS.items():
        alone, own = trained({stack: shape})
        assert torch.equal(alone[stack], together[stack])
        assert_equal(own[stack], kept[stack])
    storages = [x.untyped_storage().data_ptr() for x in tensors(kept)]
    assert len(set(storages)) == len(storages)
    assert_equal(trained(STACKS, donate=True), (together, kept))


def test_a_batch_on_a_cpu_has_a_largest_size_but_a_stack_is_whole(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tx, g, found = shampoo(every=1, start=1), gradient(1, STACKS), []
    for largest in (solving.CACHED_BATCH, 3 * 25):
        monkeypatch.setattr(solving, "CACHED_BATCH", largest)
        found.append(tx.update(g, tx.init(g, block_ndim=1), block_ndim=1))
        joined = largest > 100
        fives = [1 + 1 + 2 + 3, 4] if joined else [1 + 1, 2, 3, 4]
        sixes = [3 + 2] if joined else [3, 2]
        assert sorted(calls) == sorted([(5, n) for n in fives] + [(6, n) for n in sixes])
        calls.clear()
    assert_equal(*found)


def test_a_batch_elsewhere_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with rows whose turn it is."""
    monkeypatch.setattr(solving, "LARGEST_BATCH", 2 * 25)
    rule = RootRule(5, 0.25, 1.0, linalg.newton_schulz(), 0.0, None, None)
    stack = torch.zeros(4, 5, 5, device="meta")
    (kept,) = (
        Refreshing(lambda block: [rule], RefreshSchedule()).init({"5": stack[:, 0]}, 1).kept["5"]
    )
    jobs = [Job(rule, (torch.clone, stack), kept, rows) for rows in ((0, 1, 3), None)]
    batches = solving.batches(jobs)
    assert [[list(rows) for _, rows in batch] for batch in batches] == [  # type: ignore[arg-type]
        [[0, 1]], [[3], [0]], [[1, 2]], [[3]],
    ]  # fmt: skip
    solving.carry_out(jobs, in_blocks=True)
    for donate in (False, True):
        after = [job.ended(donate) for job in jobs]
        assert all(
            [x.shape == y.shape for new in after for x, y in zip(tensors(new), tensors(kept))]
        )


def test_rules_are_the_same_where_their_numbers_are() -> None:
    epsilon = torch.tensor(0.1)

    def rule(side: int = 5, epsilon: Any = 0.0, solver: Any = None) -> RootRule:
        return RootRule(side, 0.25, 1.0, solver or linalg.eigh(), epsilon, None, None)

    assert is_same(rule(), rule())
    assert is_same(rule(epsilon=epsilon), rule(epsilon=epsilon))
    assert not is_same(rule(epsilon=epsilon), rule(epsilon=epsilon.clone()))
    assert not is_same(rule(), rule(6))
    assert not is_same(rule(), rule(solver=linalg.eigh(relative_epsilon=0.1)))
    assert not is_same(Basis(5), Root(5))
    assert len({rule(), rule(), rule(epsilon=epsilon)}) == 2
    assert pickle.loads(pickle.dumps(rule())) == rule()
    assert rule().threaded
    assert not rule(solver=linalg.coupled_newton()).threaded


def test_costs_are_those_that_balance_ranks() -> None:
    for d in (1, 10, 256, 1024):
        assert eigh_seconds(d) == DEFAULT_COST.root(d)
    rules: Any = lambda block: [Root(d) if d > 1 else None for d in block]  # noqa: E731
    refreshing = Refreshing(rules, RefreshSchedule(every=5))
    assert refreshing.cost((8, 1, 16)) == (eigh_seconds(8) + eigh_seconds(16)) / 5


@pytest.mark.parametrize(
    ("schedule", "error"),
    [({"every": 0}, ValueError), ({"start": 1.5}, TypeError), ({"stagger": 1}, TypeError)],
    ids=str,
)
def test_a_schedule_out_of_range_is_named(schedule: Any, error: Any) -> None:
    (name,) = schedule
    for make in (soap, kl, shampoo):
        with pytest.raises(error, match=name):
            make(**schedule)


# Rows that have never been seen


@pytest.mark.parametrize("max_size", [None, 8, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stagger": True},
        {"basis_tolerance": 0.3},
        {"solver": linalg.newton_schulz()},
        {"solver": linalg.pseudo_inverse()},
        {"packed": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_row_without_gradient_stays_where_it_is(options: Any, max_size: int | None) -> None:
    """A padding row of an embedding: rounding in the null space of the factors must not move it.

    The gradient has fewer rows than the block at first, so the null space has many dimensions.
    """
    tx = fs.chain(fs.kronecker_statistics(0.99), fs.root_inverse(2, **options))
    tx = fs.chain(tx if max_size is None else fs.blocked(tx, max_size=max_size), fs.ema(0.9))
    for donate in (False, True):
        params = {"w": torch.zeros(40, 12)}
        state = tx.init(params)
        for t in range(9):
            g = torch.zeros(40, 12)
            draw = torch.Generator().manual_seed(t)
            rows = torch.randint(0, 40, (6,), generator=draw)
            g[rows] = torch.randn(6, 12, generator=draw)
            g[17], g[:, 3] = 0.0, 0.0
            updates, state = tx.update({"w": g}, state, params, donate=donate)
            assert not updates["w"][17].any()
            assert not updates["w"][:, 3].any()
        assert updates["w"].any()
