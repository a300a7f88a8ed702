"""Parts of a checkpoint are of one run and one step, and all ranks load, or none does."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import funshampoo as fs
from funshampoo.state import load_state_dict, merged, state_dict
from funshampoo.state.parts import Part
from tests.distributed.problems import SMALL, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.distributed.test_edits import begun, give_gradients, local, parameters, shampoo
from tests.trees import assert_equal

KEY = "funshampoo/part"
MAKERS: dict[str, Callable[[], fs.GradientTransformation]] = {
    "shampoo": lambda: optimizer({}),
    "leaves": lambda: fs.sharded(fs.scale_by_adam()),
    "no steps": lambda: fs.sharded(fs.scale_by_adam(), max_failures=None),
    "partition": lambda: fs.partition(
        {"a": optimizer({}), "b": fs.sharded(fs.scale_by_adam())},
        {name: "a" if name == "w" else "b" for name in SMALL},
    ),
}


def functional(rank: int, name: str) -> list[dict[str, Tensor]]:
    """What this rank saves of a run, twice, and of another one; all by one transformation."""
    tx, params = MAKERS[name](), tree(0, SMALL)
    found = []
    for seed in (0, 0, 70):
        state = train(tx, params, range(1, 4), lambda t, s=seed: tree(s + t, SMALL))[1]
        found.append({n: x.clone() for n, x in state_dict(state).items()})
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_parts_of_two_runs_do_not_merge(ranks: Ranks, name: str) -> None:
    first, second = ranks(2, functional, name)
    runs = [Part.read(found[KEY]).run for found in (first[0], second[0], first[1], first[2])]
    assert runs[0] == runs[1] == runs[2] != 0  # a function: the same once more
    assert runs[3] not in (0, runs[0])
    whole = merged([first[0], second[1]])
    assert Part.read(whole[KEY])[:2] == (0, 1)
    assert Part.read(whole[KEY]).run == 0  # there are no others that it has to fit
    with pytest.raises(ValueError, match="different runs .* give those of one save"):
        merged([first[0], {**second[0], KEY: second[2][KEY]}])
    with pytest.raises(ValueError, match="give those of one save|not saved at the same step"):
        merged([first[0], second[2]])
    old = [without_run(part) for part in (first[0], second[0])]
    assert merged(old).keys() == whole.keys()
    with pytest.raises(ValueError, match="different runs"):
        merged([old[0], second[0]])


def without_run(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """As releases before this one saved it."""
    return {**part, KEY: Part.read(part[KEY])._replace(run=0).entry()}


def test_a_process_of_its_own_has_no_number() -> None:
    state = train(optimizer({}), tree(0, SMALL), range(1, 3), lambda t: tree(t, SMALL))[1]
    assert Part.read(state_dict(state)[KEY]).run == 0


def resumed(rank: int, saved: Any, way: str) -> Any:
    """The number after a save, a load and a step; by functions, or the wrapper."""
    if way == "functions":
        tx, params = optimizer({}), tree(0, SMALL)
        state = load_state_dict(tx.init(params), saved[rank]).state
        state = train(tx, params, range(4, 6), lambda t: tree(t, SMALL), state)[1]
        return Part.read(state_dict(state)[KEY]).run
    params, opt = begun(way)
    mine = copy.deepcopy(opt.state_dict())
    params = parameters(way)
    again = shampoo(params)
    again.load_state_dict(mine)
    give_gradients(params, 9)
    again.step()
    return number(mine), number(again.state_dict())


def number(saved: Any) -> int:
    (found,) = (e[f"shared/{KEY}"] for e in saved["state"].values() if f"shared/{KEY}" in e)
    return Part.read(found).run


def test_the_number_outlives_a_resume(ranks: Ranks) -> None:
    parts = [found[0] for found in ranks(2, functional, "shampoo")]
    assert set(ranks(2, resumed, parts, "functions")) == {Part.read(parts[0][KEY]).run}
    for way in ("whole", "parts"):
        first, second = ranks(2, resumed, None, way)
        assert first == second
        assert first[0] == first[1] != 0


def unlike_states(rank: int) -> str:
    """Each rank goes on from its own part, of one run or of another."""
    tx, params = optimizer({}), tree(0, SMALL)
    saved = functional(rank, "shampoo")[2 * rank]
    state = load_state_dict(tx.init(params), saved).state
    try:
        tx.update(tree(9, SMALL), state, params)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_step_of_states_of_two_runs_is_refused(ranks: Ranks) -> None:
    for message in ranks(2, unlike_states):
        assert "the run that the state is of is" in message


def loads(rank: int, case: str) -> Any:
    """(error, seconds) of a load; nothing has been changed, and training goes on."""
    dicts = []
    params, opt = begun("whole")
    for t in (3, 4):
        dicts.append(copy.deepcopy(opt.state_dict()))
        give_gradients(params, t)
        opt.step()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dicts[0])
    given = {
        "rank 0's alone": gathered[0],
        "another step": dicts[rank],
        "no checkpoint": {"state": {}} if rank == 1 else dicts[0],
        "None": None if rank == 1 else dicts[0],
        "own": dicts[0],
    }[case]
    before, since, found = local(params), time.monotonic(), ""
    try:
        opt.load_state_dict(given)
    except (TypeError, ValueError, RuntimeError) as error:
        found = str(error)
    seconds = time.monotonic() - since
    assert_equal(local(params), before)
    give_gradients(params, 5)
    opt.step()
    assert any((a != b).any() for a, b in zip(local(params), before))
    return found, seconds


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("rank 0's alone", ("rank 1 of 2 could not load", "the part of rank 0 of 2: save every")),
        ("another step", ("is of another step or run than those of other ranks",) * 2),
        ("no checkpoint", ("rank 1 of 2 could not load", "this is no state_dict of an optimizer")),
        ("None", ("rank 1 of 2 could not load", "give what state_dict() returned")),
        ("own", ("", "")),
    ],
)
def test_all_ranks_load_or_none(ranks: Ranks, case: str, messages: tuple[str, str]) -> None:
    for (found, seconds), message in zip(ranks(2, loads, case), messages):
        assert message in found
        assert bool(found) == bool(message)
        assert seconds < 10


def seeds(rank: int, case: str, method: Any) -> tuple[str, Any]:
    """(error, state) after the moments of an AdamW, of two matrices or one, are taken over."""
    shapes = [(4, 3)] if case == "one matrix" else [(4, 3), (3, 4)]
    there = [(4, 3), (5, 4)] if case == "other shapes" else shapes
    old, new = [[torch.nn.Parameter(torch.ones(s)) for s in each] for each in (there, shapes)]
    adamw = torch.optim.AdamW(old)
    for _ in range(2 if case == "other steps" and rank == 1 else 1):
        for p in old:
            p.grad = torch.ones_like(p)
        adamw.step()
    opt = fs.Optimizer(new, method, lr=0.1, distribute=fs.sharded, accept_adamw=True)
    saved = opt.state_dict() if case == "ours" and rank == 1 else adamw.state_dict()
    if case == "nothing" and rank == 1:
        saved = {}
    act = opt.load_state_dict if case == "ours" else opt.seed_from_adamw
    try:
        act(saved)
    except (TypeError, ValueError) as error:
        assert not any(x.any() for own in opt.state.values() for n, x in own.items() if "seco" in n)
        return str(error), None
    for p in new:
        p.grad = torch.ones_like(p)
    opt.step()
    return "", new[0].detach()


@pytest.mark.parametrize("method", [fs.adamw, fs.shampoo])
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("other shapes", ("rank 1 of 2 could not load", "has other shapes in the AdamW")),
        ("other steps", ("of another step or run than those of other ranks",) * 2),
        ("nothing", ("Give all ranks the same", "saved is {}; give the state_dict")),
        ("ours", ("of another step or run than those of other ranks",) * 2),
        ("one matrix", ("", "")),  # of which rank 1 has nothing
    ],
)
def test_all_ranks_go_on_from_an_adamw_or_none(
    ranks: Ranks, case: str, messages: tuple[str, str], method: Any
) -> None:
    (one, x), (other, y) = ranks(2, seeds, case, method)
    assert all(message in found for message, found in zip(messages, (one, other)))
    assert (one == "") == (other == "") == (messages[0] == "")
    if x is not None:
        assert_equal(x, y)


def alone(rank: int, call: str) -> str:
    """Rank 0 does by itself what all have to do together, while the other one steps."""
    params, opt = begun("whole", consolidate=call == "state_dict")
    saved = fs.Shampoo(parameters("whole")[:4], lr=0.03, every=2).state_dict()
    act: Callable[[], Any] = opt.step
    if rank == 0:
        act = opt.state_dict if call == "state_dict" else lambda: opt.load_state_dict(saved)
    before = local(params)
    try:
        act()
    except RuntimeError as error:
        assert_equal(local(params), before)
        dist.all_reduce(torch.tensor(1.0))
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("call", "said"),
    [("state_dict", "consolidate_state_dict"), ("load_state_dict", "load_state_dict")],
)
def test_one_rank_that_saves_or_loads_alone_is_told(ranks: Ranks, call: str, said: str) -> None:
    for message in ranks(2, alone, call):
        assert f"the call is {said} on rank 0, step on rank 1" in message
