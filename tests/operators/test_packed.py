"""Factor matrices and roots of which one triangle is kept: the same numbers in half the memory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import linalg
from funshampoo.operators.leaf_ops import add_gram
from funshampoo.operators.packed import in_form_of, pack, packed_shape, side_of, unpack
from funshampoo.operators.packed_statistics import add_packed_gram
from funshampoo.plan.planner import plan
from funshampoo.state import (
    Kept,
    KroneckerState,
    find_state,
    health,
    load_state_dict,
    state_dict,
    summary,
)
from tests.test_position import SUBSETS, N, assert_same, one_thread, randn, rows_of
from tests.trees import assert_close, assert_equal, gradients, problem, tensors, train

__all__ = ["one_thread"]  # a fixture, for all tests here

D = torch.float64
SIDES = [1, 2, 3, 4, 5, 8, 9, 16, 41, 64]


def test_small_sides_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As elsewhere than in tests."""
    monkeypatch.setattr("funshampoo.operators.packed.SMALLEST", 64)
    tx = fs.shampoo(0.1, packed=True)
    params = {"w": randn(64, 63)}
    for state in (tx.init(params), tx.update(params, tx.init(params))[1]):
        factors = find_state(state, KroneckerState).factors["64x63"]
        roots = find_state(state, fs.state.RefreshedState).kept["64x63"]
        assert [f.shape[1:] for f in factors] == [packed_shape(64), (63, 63)]
        assert [r.value[0].shape[1:] for r in roots] == [packed_shape(64), (63, 63)]


def symmetric(*shape: int, seed: int = 0) -> Tensor:
    x = randn(*shape, dtype=D, seed=seed)
    return x + x.mT


@pytest.mark.parametrize("d", SIDES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_packed_and_back_is_bit_for_bit(d: int, lead: tuple[int, ...]) -> None:
    S = symmetric(*lead, d, d)
    packed = pack(S)
    assert packed.shape == (*lead, *packed_shape(d))
    assert packed[..., :, :].numel() == S.numel() // d * (d + 1) // 2
    assert side_of(packed) == side_of(S) == d
    assert torch.equal(unpack(packed), S)
    assert torch.equal(in_form_of(S, packed), packed)
    assert torch.equal(in_form_of(packed, S), S)
    other = torch.zeros(d + 1, d + 1)
    assert in_form_of(packed, other) is packed


def test_packing_batches_and_has_derivatives() -> None:
    S = symmetric(4, 2, 5, 5)
    assert torch.equal(torch.func.vmap(pack)(S), pack(S))
    assert torch.equal(torch.func.vmap(unpack)(pack(S)), S)
    x = pack(S)[0].requires_grad_()
    assert torch.autograd.gradcheck(unpack, (x,))
    assert torch.autograd.gradcheck(lambda x: pack(unpack(x)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: unpack(x) ** 2, (x,))


@pytest.mark.parametrize(
    ("d", "n"),
    [*itertools.product(SIDES, [1, 7, 16]), (1032, 256)],  # panels, the last one thin
)
def test_the_update_is_that_of_the_full_matrix(d: int, n: int) -> None:
    S, x = symmetric(3, d, d), randn(3, d, n, dtype=D, seed=1)
    expected = add_gram(S, x, 0.9, 0.1, donate=False)
    old = pack(S)
    before = old.clone()
    pure = add_packed_gram(old, x, 0.9, 0.1, donate=False)
    assert torch.equal(old, before)
    torch.testing.assert_close(unpack(pure), expected, rtol=1e-12, atol=1e-12)
    donated = add_packed_gram(old, x, 0.9, 0.1, donate=True)
    assert torch.equal(donated, pure)
    assert donated.data_ptr() == old.data_ptr()
    beta, weight = torch.tensor(0.9, dtype=D), torch.tensor(0.1, dtype=D)
    for found in (
        add_packed_gram(before, x, beta, weight, donate=False),
        add_packed_gram(before[0], x[0], 0.9, 0.1, donate=False),
        torch.func.vmap(lambda s, x: add_packed_gram(s, x, 0.9, 0.1, donate=True))(before, x),
    ):
        torch.testing.assert_close(found, pure if found.ndim == 3 else pure[0])


def inner(**options: Any) -> fs.GradientTransformation:
    root = fs.root_inverse(every=2, packed=True, **options)
    statistics = fs.kronecker_statistics(0.99, packed=True)
    return fs.chain(statistics, fs.ema(0.9), fs.graft(root, onto=fs.scale_by_adam(0.0)))


BLOCKS = [
    (9,),
    (24,),
    (1, 30),
    (9, 9),
    (10, 7),
    (24, 40),
    (41, 16),
    (1032, 256),
    (5, 7, 3),
    (8, 16, 9),
]


@pytest.mark.parametrize(
    ("block", "product_dtype"),
    [
        pytest.param(block, dtype, marks=[pytest.mark.slow] if max(block) > 1000 else [])
        for dtype in (None, torch.bfloat16)
        for block in BLOCKS
    ],
    ids=str,
)
def test_a_rows_bits_do_not_depend_on_its_place(
    block: tuple[int, ...], product_dtype: torch.dtype | None
) -> None:
    tx = inner(product_dtype=product_dtype)

    def run(stacks: list[Tensor], donate: bool) -> Any:
        state, history = tx.init({"stack": stacks[0]}, block_ndim=1), []
        for x in stacks:
            tree = {"stack": x}
            updates, state = tx.update(tree, state, gradient=tree, block_ndim=1, donate=donate)
            history.append(updates)
        return history, state

    stacks = [randn(N, *block, seed=t) for t in range(4)]
    together = run(stacks, donate=False)
    for i, rows in enumerate(SUBSETS):
        own = run([x[rows] for x in stacks], donate=i % 2 == 1)
        assert_same(rows_of(own, list(range(len(rows)))), rows_of(together, rows))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_size": 4},
    {"max_size": 5, "stagger": True},
    {"exponents": {1: 0.0, 2: {0: 0.5, 1: 0.0}}},
    {"initial_eigenvalue": 4.0, "start": 3},
    {"trace_scaling": 0.5, "epsilon": 1e-4},
    {"grafting": None},
    {"beta2": 1.0, "solver": linalg.coupled_newton()},
    {"beta2": torch.tensor(0.9, dtype=D), "own_steps": False},
    {"stagger": True},
    {"basis_tolerance": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("donate", [False, True])
def test_a_training_is_that_without(options: dict[str, Any], donate: bool) -> None:
    """Parameters of orders 0 to 4 in float64; with a damping that does not amplify rounding."""
    defaults = {"every": 2, "relative_epsilon": 1e-3} | options
    trained = []
    for packed in (False, True):
        tx = fs.shampoo(0.1, packed=packed, **defaults)
        new, _, state = train(tx, problem(), gradients(7), fs.apply_updates, donate=donate)
        trained.append(new)
    assert_close(trained[1], trained[0], 1e-11)
    for kind, field in ((KroneckerState, "factors"), (Kept, "value")):
        found = find_state(state, kind)
        assert found is not None
        matrices = of(found, field)[: 1 if kind is Kept else None]  # a basis is no symmetric matrix
        assert all(x.shape[-2] != x.shape[-1] or x.shape[-1] == 1 for x in matrices)


def of(state: Any, field: str) -> list[Tensor]:
    return tensors(getattr(state, field))


@pytest.mark.parametrize("statistics", [False, True])
def test_either_stage_may_be_packed_without_the_other(statistics: bool) -> None:
    def trained(first: bool, second: bool) -> Any:
        root = fs.root_inverse(2, packed=second, solver=linalg.eigh(relative_epsilon=1e-3))
        tx = fs.blocked(fs.chain(fs.kronecker_statistics(0.9, packed=first), root), 4)
        return train(tx, problem(), gradients(5), fs.apply_updates)[0]

    assert_close(trained(statistics, not statistics), trained(False, False), 1e-11)


def test_the_memory_of_matrices_is_half() -> None:
    params = {"w": torch.zeros(256, 256), "b": torch.zeros(64)}
    memory = [
        summary(fs.shampoo(0.1, packed=packed, max_size=128).init(params), file=io.StringIO())
        for packed in (False, True)
    ]
    full, half = (m.stages["blocked/kronecker_statistics"] for m in memory)
    assert half / full == pytest.approx(129 / 256, rel=0.01)
    assert sum(memory[1].parameters.values()) == pytest.approx(memory[1].total, abs=3)
    planned = plan(params, 2, transformation=fs.shampoo(0.1, packed=True, max_size=128))
    assert sum(r.state_bytes for r in planned.ranks) == pytest.approx(memory[1].total, rel=1e-3)
    every = plan(params, 2, max_size=128).stacks["128x128"].state_bytes
    saved = 2 * 2 * (128 * 127 // 2) * 4  # factors and roots of two sides
    assert every - planned.stacks["128x128"].state_bytes == saved


def test_health_reads_the_same_numbers_and_the_guard_holds_blocks() -> None:
    reports = []
    for packed in (False, True):
        tx = fs.shampoo(0.1, packed=packed, every=2, max_size=4, relative_epsilon=1e-3)
        _, _, state = train(tx, problem(), gradients(2), fs.apply_updates)
        bad = gradients(1)[0]
        bad["w"][0, 0] = float("nan")
        _, state = tx.update(bad, state, problem())
        reports.append(health(state, file=io.StringIO()))
    for a, b in zip(reports[0].factors, reports[1].factors):
        assert b == a._replace(condition=b.condition, residual=b.residual, worst=b.worst)
        assert b.condition == pytest.approx(a.condition, rel=1e-6)
    assert reports[1].held == 1


def test_a_failing_solver_keeps_the_old_root() -> None:
    def solver(matrix: Tensor, p: float, epsilon: Any) -> linalg.InverseRoot:
        assert matrix.shape == (3, 2, 2)  # never packed
        found = linalg.eigh()(matrix, p, 1e-3)
        return found._replace(converged=torch.tensor([True, False, True]), root=found.root * 7)

    root = fs.root_inverse(1, solver=solver, packed=True)
    tx = fs.blocked(fs.chain(fs.kronecker_statistics(1.0, packed=True), root), 2)
    g = {"g": randn(6, dtype=D)}
    _, state = tx.update(g, tx.init(g))
    found = find_state(state, Kept)
    assert found is not None
    assert found.failures.tolist() == [0, 1, 0]
    assert found.value[0].shape == (3, *packed_shape(2))
    assert torch.equal(unpack(found.value[0])[1], torch.eye(2, dtype=D))
    assert not torch.equal(unpack(found.value[0])[0], torch.eye(2, dtype=D))


@pytest.mark.parametrize("was_packed", [False, True])
def test_a_checkpoint_of_one_form_loads_into_the_other(was_packed: bool) -> None:
    def make(packed: bool) -> fs.GradientTransformation:
        return fs.shampoo(0.1, packed=packed, every=2, max_size=4, relative_epsilon=1e-3)

    params, grads = problem(), gradients(6)
    now, _, state = train(make(was_packed), params, grads[:3], fs.apply_updates)
    saved = state_dict(state)
    other = make(not was_packed)
    loaded = load_state_dict(other.init(params), saved)
    assert loaded.missing == loaded.unknown == []
    again = load_state_dict(make(was_packed).init(params), state_dict(loaded.state)).state
    # A factor's two triangles may differ in the last bit, of which the packed one knows one.
    assert_close(again, state, 1e-14)
    if was_packed:
        assert_equal(again, state)
    new = loaded.state
    for g in grads[3:]:
        updates, state = make(was_packed).update(g, state, now)
        others, new = other.update(g, new, now)
        assert_close(others, updates, 1e-11)


def test_a_checkpoint_of_another_block_size_is_still_an_error() -> None:
    saved = state_dict(fs.shampoo(0.1, packed=True, max_size=3).init(problem()))
    state = fs.shampoo(0.1, max_size=4).init(problem())
    with pytest.raises(ValueError, match="does not fit"):
        load_state_dict(state, saved)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_roots_from_several_threads(two_threads: None) -> None:
    params, grads = {"w": randn(640, 64)}, [{"w": randn(640, 64, seed=t)} for t in range(1, 4)]
    trained = []
    for packed in (False, True):
        tx = fs.shampoo(0.1, packed=packed, max_size=64, every=2, relative_epsilon=1e-3)
        trained.append(train(tx, params, grads, fs.apply_updates)[0])
    assert_close(trained[1], trained[0], 1e-4)
