"""What a refresh is made of: batches, rules, costs; and rows that have never been seen."""

from __future__ import annotations

import collections
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo import linalg
from funshampoo.core.context import Context, changed
from funshampoo.distributed.cost import DEFAULT_COST
from funshampoo.refresh import Found, Refreshing, RefreshSchedule, solving
from funshampoo.refresh.jobs import Job
from funshampoo.refresh.roots import RootRule
from funshampoo.refresh.rule import eigh_seconds, is_same
from tests.refresh.clients import Basis, Root
from tests.refresh.methods import gradient, kl, shampoo, soap
from tests.test_position import one_thread
from tests.trees import assert_equal, tensors

__all__ = ["one_thread"]  # a fixture, for all tests here


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


def test_the_results_of_a_unit_are_written_at_once() -> None:
    """And nothing is chosen where all have converged."""
    tx, g = shampoo(every=1, start=1), gradient(1, STACKS)
    _, state = tx.update(g, tx.init(g, block_ndim=1), block_ndim=1)
    with Operators() as seen:
        _, state = tx.update(g, state, block_ndim=1, donate=True)
    units = sum([len(shape) - 1 for shape in STACKS.values()])
    assert (seen.found["_foreach_copy_"], seen.found["copy_"]) == (units, 2)  # borders of side 5
    assert seen.found["where"] == 9  # one of weights in every unit, and of the borders
    before = [x._version for x in tensors(state["root_inverse"].kept)]  # for `Watched`
    _, state = tx.update(g, state, block_ndim=1, donate=True)
    after = [x._version for x in tensors(state["root_inverse"].kept)]
    assert all([now > then for now, then in zip(after, before)])


class Operators(TorchDispatchMode):
    """The operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("donate", [False, True])
def test_one_cpu_thread_computes_a_stack_in_pieces(
    donate: bool, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tx, g, found = shampoo(every=1, start=1), gradient(1, {"6x6": (5, 6, 6)}), []
    for numbers, counts in ((solving.CACHED_PIECE, [5, 5]), (2 * 36, [2, 2, 1] * 2), (1, [1] * 10)):
        monkeypatch.setattr(solving, "CACHED_PIECE", numbers)
        monkeypatch.setattr(solving, "CACHED_BATCH", numbers)
        calls.clear()
        found.append(tx.update(g, tx.init(g, block_ndim=1), block_ndim=1, donate=donate))
        assert sorted(calls) == sorted([(6, n) for n in counts if numbers <= 72] or [(6, 10)])
    for other in found[1:]:
        assert_equal(other, found[0])


def test_a_batch_elsewhere_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with rows whose turn it is."""
    monkeypatch.setattr(solving, "LARGEST_BATCH", 2 * 25)
    rule = RootRule(5, 0.25, 1.0, linalg.newton_schulz(), 0.0, None, None)
    stack = torch.zeros(4, 5, 5, device="meta")
    (kept,) = (
        Refreshing(lambda block: [rule], RefreshSchedule()).init({"5": stack[:, 0]}, 1).kept["5"]
    )

    def jobs() -> list[Job]:
        return [Job(rule, (torch.clone, stack), kept, rows) for rows in ((0, 1, 3), None)]

    batches = solving.batches(jobs())
    assert [[list(rows) for _, rows in batch] for batch in batches] == [  # type: ignore[arg-type]
        [[0, 1]], [[3], [0]], [[1, 2]], [[3]],
    ]  # fmt: skip
    for donate in (False, True):
        begun = jobs()
        solving.carry_out(begun, in_blocks=True)
        after = [job.ended(donate) for job in begun]
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
    assert Root(8).cost == eigh_seconds(8)


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


class Statistics(Basis):
    """What is kept is the matrix itself."""

    def __call__(self, A: Tensor, old: tuple[Tensor, ...], rounds: Tensor) -> Found:
        unknown = A.new_full(A.shape[:-2], -1.0)
        value = A.detach() if self.side == 3 else A  # another tensor in its memory
        return Found((value,), unknown, unknown, unknown < 0)


@pytest.mark.parametrize("lead", [(), (4,)])
def test_what_a_rule_returns_shares_no_memory_with_what_it_was_made_from(lead: Any) -> None:
    """Which is another stage's state: a later step in its memory changed what had been kept."""
    refreshing = Refreshing(lambda block: [Statistics(d) for d in block], RefreshSchedule(10))
    g = {"w": torch.zeros(*lead, 2, 3)}  # of one side there would be a batch, which is a copy
    factors = {"w": tuple([torch.ones(*lead, d, d) for d in (2, 3)])}
    state = refreshing.init(g, len(lead))
    context = Context(step=1, block_ndim=len(lead))

    def read(unit: int, sides: Any) -> Any:
        return (lambda A: A), sides[unit]

    kept = refreshing.update(g, state, (factors,), read, context).kept["w"]
    for unit, factor in zip(kept, factors["w"]):
        factor.zero_()
        assert unit.value[0].all()


WRONG = {
    "no Found": (lambda A: A, TypeError, r"Returns returned a Tensor: a rule returns Found\("),
    "one too many": (lambda A: found(A, A), ValueError, r"returned .*\(\d, \d\)\], where its"),
    "one too few": (lambda A: found(), ValueError, r"returned a value of tensors \[\], where its"),
    "broadcast": (
        lambda A: found(A[..., :1, :]),
        ValueError,
        r"\[\(1, \d\)\], where its `initial`",
    ),
    "a root that is no matrix": (
        lambda A: found(A[..., :1]),
        ValueError,
        r"\[\(\d, 1\)\], where its `initial`",
    ),
    "a number for none": (
        lambda A: changed(found(A), residual=torch.zeros(1)),
        ValueError,
        r"Returns returned residual \(1,\), for matrices \(\d, \d\): return one for each, \(\)",
    ),
}


def found(*value: Tensor) -> Found:
    number = torch.zeros(())
    return Found(value, number, number, torch.ones((), dtype=torch.bool))


@pytest.mark.parametrize(("result", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_a_rule_may_return(result: Any, error: Any, message: str) -> None:
    """What does not fit was left out or broadcast, or an error inside of the refresh."""

    class Returns(Basis):
        symmetric = (0,)

        def __call__(self, A: Tensor, old: Any, rounds: Tensor) -> Any:
            return result(A)

    bases = Refreshing(lambda block: [Returns(d) for d in block], RefreshSchedule(1))
    grads = {"w": torch.randn(3, 2)}

    def read(side: int, g: Tensor) -> Any:
        return lambda x: x @ x.mT, g.mT if side else g

    with pytest.raises(error, match=message):
        bases.update(grads, bases.init(grads), (grads,), read, Context(step=1))
