"""Ranks that do not agree are told what differs and where, before anything moves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import funshampoo as fs
from tests.distributed.problems import SMALL, optimizer, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

GUILTY = 2  # of three


class Job(NamedTuple):
    """One rank's part: a step by number, and what must not move."""

    step: Callable[[int], Any]
    params: Callable[[], list[Tensor]]


def functional(params: Any = None, grads: Any = tree, donate: bool = False, **options: Any) -> Job:
    """`options` of shampoo; those of sharded below `sharding`."""
    params = tree(0, SMALL) if params is None else params
    tx = optimizer(options.pop("sharding", {}), **options)
    now: dict[str, Any] = {"state": tx.init(params), "params": params}

    def step(t: int, **context: Any) -> None:
        g = grads(t, SMALL) if grads is tree else grads
        updates, now["state"] = tx.update(g, now["state"], now["params"], donate=donate, **context)
        now["params"] = fs.apply_updates(now["params"], updates)

    return Job(step, lambda: torch.utils._pytree.tree_leaves(now["params"]))


def wrapped(order: str, *, zeros: bool = False, named: bool = False, **options: Any) -> Job:
    """Parameters of one shape, given in this order."""
    generator = torch.Generator().manual_seed(0)
    known = {n: nn.Parameter(torch.randn(4, 4, generator=generator)) for n in "abc"}
    grads = {n: torch.randn(4, 4, generator=generator) for n in "abc"}
    if zeros:
        for p in known.values():
            p.data.zero_()
    given: Any = [(n, known[n]) if named else known[n] for n in order]
    opt = fs.Shampoo(given, **({"lr": 0.1, "every": 2, "distribute": fs.sharded} | options))

    def step(t: int, **group: Any) -> None:
        opt.param_groups[0].update(group)
        for n, p in known.items():
            p.grad = t * grads[n]
        opt.step()

    return Job(step, lambda: [p.detach() for p in known.values()])


def listed(*shapes: tuple[int, ...]) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def of_list(*shapes: tuple[int, ...]) -> Job:
    params = listed(*shapes)
    return functional(params, grads=[torch.ones_like(p) for p in params])


def cast(dtype: torch.dtype) -> Job:
    params = {name: x.bfloat16() for name, x in tree(0, SMALL).items()}
    return functional({**params, "w": params["w"].to(dtype)})


def swapped(params: Any) -> Any:
    return {("kern" if name == "kernel" else name): x for name, x in params.items()}


def rated(rate: Any) -> Job:
    tx = fs.sharded(fs.chain(fs.trace(0.9), fs.scale_by_learning_rate(rate)))
    params = tree(0, SMALL)

    def step(t: int) -> None:
        tx.update(tree(t, SMALL), tx.init(params), params)

    return Job(step, lambda: list(params.values()))


# {what differs: (the rank's job, what the message says)}
CASES: dict[str, tuple[Callable[[bool], Job], str]] = {
    "order of unnamed": (
        lambda bad: wrapped("acb" if bad else "abc"),
        "'param_1' of rank 0 is 'param_2' of rank 2",
    ),
    "order of unnamed that are equal": (
        lambda bad: wrapped("acb" if bad else "abc", zeros=True),
        "by its gradient, 'param_1' of rank 0 is 'param_2' of rank 2",
    ),
    "order of unlike shapes": (
        lambda bad: of_list((6, 4), (4, 6)) if bad else of_list((4, 6), (6, 4)),
        "parameter 0 is '0', (4, 6), torch.float32 on rank 0, '0', (6, 4)",
    ),
    "names": (
        lambda bad: functional(
            swapped(tree(0, SMALL)) if bad else None,
            swapped(tree(1, SMALL)) if bad else tree,
        ),
        "parameter 1 is 'kernel', (6, 3, 2), torch.float32 on rank 0, 'kern', (6, 3, 2)",
    ),
    "number": (
        lambda bad: wrapped("ab" if bad else "abc"),
        "the number of parameters is 3 on rank 0, 2 on rank 2",
    ),
    "dtype": (
        lambda bad: cast(torch.float32 if bad else torch.bfloat16),
        "'w', (20, 13), torch.bfloat16 on rank 0, 'w', (20, 13), torch.float32 on rank 2",
    ),
    "every": (
        lambda bad: functional(every=5 if bad else 4),
        "every is 4 on rank 0, 5 on rank 2",
    ),
    "max_failures": (
        lambda bad: functional(max_failures=5 if bad else 4),
        "max_failures is 4 on rank 0, 5 on rank 2",
    ),
    "communication_dtype": (
        lambda bad: functional(sharding={"communication_dtype": torch.bfloat16 if bad else None}),
        "communication_dtype is None on rank 0, torch.bfloat16 on rank 2",
    ),
    "cost": (
        lambda bad: functional(
            sharding={"cost": fs.distributed.CostModel(per_flop=0.1) if bad else None}
        ),
        "cost is None on rank 0, CostModel(",
    ),
    "a static number": (
        lambda bad: functional(beta2=0.9 if bad else 0.99),
        "kronecker_statistics: beta2 is 0.99 on rank 0, 0.9 on rank 2",
    ),
    "stages": (
        lambda bad: functional(momentum=0.0 if bad else 0.9),
        "ema, graft, trace, add_decayed_weights",
    ),
    "staggering": (
        lambda bad: functional(stagger=bad),
        "root_inverse: stagger is False on rank 0, True on rank 2",
    ),
    "a schedule": (
        lambda bad: rated(fs.schedules.cosine(0.1, 9 if bad else 10)),
        "is 10 on rank 0, 9 on rank 2",
    ),
    "a tensor": (
        lambda bad: rated(torch.tensor(0.5 if bad else 0.25)),
        "scale_by_learning_rate: learning_rate is 0.25 on rank 0, 0.5 on rank 2",
    ),
    "live number": (
        lambda bad: wrapped("abc", lr=0.2 if bad else 0.1),
        "learning_rate is 0.1 on rank 0, 0.2 on rank 2",
    ),
}


def problem_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return ""


def first_step(rank: int, case: str) -> Any:
    job = CASES[case][0](rank == GUILTY)
    before = [p.clone() for p in job.params()]
    since = time.monotonic()
    found = problem_of(lambda: job.step(1))
    assert time.monotonic() - since < 10
    assert_equal(job.params(), before)
    total = torch.tensor(1.0)
    dist.all_reduce(total)  # and all can still talk
    return found, total.item()


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_told_what_differs_before_anything_moves(ranks: Ranks, case: str) -> None:
    for message, total in ranks(3, first_step, case):
        assert CASES[case][1] in message
        assert "do not agree" in message
        assert "Give all of them the same parameters in the same order" in message
        assert total == 3.0


def later(rank: int, how: str) -> Any:
    """After two steps in agreement one rank goes its own way, and then comes back."""
    bad = rank == GUILTY
    if how == "lr":
        job = wrapped("abc")
        steps = [lambda: job.step(3, lr=0.2 if bad else 0.1)]
    elif how == "refresh":
        job = functional()
        steps = [lambda: job.step(3, refresh=bad)]
    else:
        job = functional()
        steps = [lambda: job.step(3, step=4 if bad else 3)]
    for t in (1, 2):
        job.step(t)
    before = [p.clone() for p in job.params()]
    found = [problem_of(act) for act in steps]
    assert_equal(job.params(), before)
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    return found[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lr", "learning_rate is 0.1 on rank 0, 0.2 on rank 2"),
        ("refresh", "refresh is False on rank 0, True on rank 2"),
        ("step", "rank 0 at 3 and rank 2 at 4"),
    ],
)
def test_what_differs_later_is_told_before_the_parameters_move(
    ranks: Ranks, how: str, message: str
) -> None:
    for found in ranks(3, later, how):
        assert message in found


def in_agreement(rank: int, case: str) -> list[Tensor]:
    """What may differ: named parameters in another order, gradients, and who fails at what."""
    bad = rank == GUILTY
    if case == "named":
        job = wrapped("cab" if bad else "abc", named=True)
    else:
        g = tree(1, SMALL)
        if bad:
            g = {"nan": {**g, "w": g["w"] / 0}, "none": {**g, "w": None}, "own": tree(9, SMALL)}[
                case
            ]
        job = functional(grads=g)
    for t in range(1, 4):
        job.step(t)
    return [p.clone() for p in job.params()]


@pytest.mark.parametrize("case", ["named", "nan", "none", "own"])
def test_what_may_differ_is_no_error(ranks: Ranks, case: str) -> None:
    found = ranks(3, in_agreement, case)
    for got in found:
        assert_equal(got, found[0])
        assert all(x.isfinite().all() for x in got)


def remembered(rank: int) -> int:
    """Agreement is asked for once for each set of parameters, in each process group."""
    asked = 0
    original = fs.distributed.agreement.check_ranks_agree

    def counted(*arguments: Any) -> None:
        nonlocal asked
        asked += 1
        original(*arguments)

    fs.distributed.agreement.check_ranks_agree = counted
    try:
        tx, other = optimizer({}), {name: x for name, x in tree(0).items() if name != "conv"}
        for params in (tree(0), other, tree(0), other):
            state, shapes = tx.init(params), {name: tuple(x.shape) for name, x in params.items()}
            for t in (1, 2):
                _, state = tx.update(tree(t, shapes), state, params)
    finally:
        fs.distributed.agreement.check_ranks_agree = original
    return asked


def test_agreement_is_remembered(ranks: Ranks) -> None:
    assert ranks(2, remembered) == [2, 2]


def broken(rank: int) -> str:
    """One rank can't even say what it has."""
    module = fs.distributed.agreement
    original = module.bits_of

    def failing(leaves: Any) -> Any:
        raise KeyboardInterrupt

    module.bits_of = failing if rank == 0 else original
    try:
        return problem_of(lambda: functional().step(1))
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        module.bits_of = original


def test_a_rank_that_fails_before_the_first_step_tells_the_others(ranks: Ranks) -> None:
    first, second = ranks(2, broken)
    assert first == "interrupted"
    assert "rank 0 of 2 failed before the first step" in second


def unlike(rank: int) -> list[str]:
    params = {**tree(0, SMALL), "bias": tree(rank, SMALL)["bias"]}
    tx = fs.shampoo(0.1, distribute=fs.sharded, **OPTIONS_OF_UNLIKE)
    state = tx.init(params)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for t in range(2):
            updates, state = tx.update(tree(t, SMALL), state, params)
    assert updates["w"].any()
    return [str(w.message) for w in found if "not the same" in str(w.message)]


OPTIONS_OF_UNLIKE: dict[str, Any] = {"every": 2, "max_size": 8}


def test_parameters_of_other_values_are_warned_of_once(ranks: Ranks) -> None:
    for found in ranks(3, unlike):
        assert len(found) == 1
        assert "not the same on rank 0 and on rank 1" in found[0]
