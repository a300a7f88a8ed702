"""What one rank alone can't load is told on every rank at once, whenever it is found."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state.parts import PART_KEY, Part
from tests.distributed.ranks import Ranks
from tests.distributed.test_edits import give_gradients, local, parameters
from tests.trees import assert_equal

AT_ONCE = 10.0  # seconds; a collective gives up after 20


def new(way: str, max_size: int = 4) -> Any:
    """(parameters, optimizer): in two groups, whose states all ranks make together."""
    params = parameters(way)
    sharing = {"distribute": fs.sharded} if way == "whole" else {}
    groups = [{"params": params[:2]}, {"params": params[2:], "momentum": 0.5}]
    options: Any = {"every": 2, "max_size": max_size, "momentum": 0.9, "accept_adamw": True}
    return params, fs.Shampoo(groups, lr=0.03, **options, **sharing)


def stepped(way: str, max_size: int = 4) -> Any:
    params, opt = new(way, max_size)
    give_gradients(params, 1)
    opt.step()
    return params, opt


def copied(way: str) -> Any:
    return pickle.loads(pickle.dumps(stepped(way)))


MADE: dict[str, Callable[[str], Any]] = {"new": new, "stepped": stepped, "copied": copied}
FURTHER = [("whole", "new"), ("whole", "stepped"), ("parts", "copied")]
Fault = Callable[[Any], Any]


def in_group(i: int, **entries: Any) -> Fault:
    def fault(saved: Any) -> Any:
        saved["param_groups"][i].update(entries)
        return saved

    return fault


def damaged(saved: Any) -> Any:
    """A value that no run can have left, in the first group: others have to be made after it."""
    next(x for n, x in saved["state"][0].items() if n.endswith("factors/0")).fill_(-1.0)
    return saved


def without_the_last(saved: Any) -> Any:
    saved["state"].pop(4)
    return saved


def of_other_shapes(saved: Any) -> Any:
    for entries in saved["state"].values():
        entries |= {"exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}
    return saved


# {what one rank is given: (how, what its own error says)}
FAULTS: dict[str, tuple[Fault, str]] = {
    "no checkpoint": (lambda saved: {}, "no state_dict"),
    "a rate out of range": (in_group(1, lr=-1.0), "lr is -1.0"),
    "a switch without what it needs": (in_group(0, momentum=0.0, nesterov=True), "nesterov"),
    "two names for one": (in_group(1, param_names=["a", "a", "b"]), "are named 'a'"),
    "a damaged value": (damaged, "no run can have left"),
    "a parameter less": (without_the_last, "missing from the checkpoint"),
}
OF_AN_ADAMW: dict[str, tuple[Fault, str]] = {
    "a rate of an AdamW": (in_group(1, lr=-1.0), "lr is -1.0"),
    "other shapes": (of_other_shapes, "has other shapes in the AdamW"),
}


def an_adamws(way: str) -> Any:
    """The state_dict of an AdamW with the same groups, of whole tensors."""
    params = [torch.nn.Parameter(torch.ones(p.shape)) for p in parameters("whole")]
    adamw = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    give_gradients(params, 1)
    adamw.step()
    return adamw.state_dict()


def a_whole(way: str) -> Any:
    opt = stepped(way)[1]
    opt.consolidate_state_dict(to=None)
    return opt.state_dict()


def error_of(act: Callable[[Any], Any], saved: Any) -> str:
    since, error = time.monotonic(), ""
    try:
        act(saved)
    except (TypeError, ValueError, RuntimeError) as refusal:
        error = str(refusal)
    assert time.monotonic() - since < AT_ONCE, error
    return error


def refused(rank: int, way: str, when: str) -> dict[str, str]:
    """{fault of rank 1's checkpoint: error}; nothing has changed, and all ranks step on."""
    (params, opt), (twins, twin) = MADE[when](way), MADE[when](way)
    found = {}
    for faults, saved in ((FAULTS, a_whole(way)), (OF_AN_ADAMW, an_adamws(way))):
        for name, (fault, _) in faults.items():
            own = copy.deepcopy(saved)
            found[name] = error_of(opt.load_state_dict, fault(own) if rank == 1 else own)
    for ours, theirs in zip(opt.param_groups, twin.param_groups):
        assert {**ours, "params": []} == {**theirs, "params": []}
    give_gradients(params, 2)
    give_gradients(twins, 2)
    opt.step()
    twin.step()
    assert_equal(local(params), local(twins))
    return found


@pytest.mark.parametrize(
    ("way", "when"),
    [
        ("parts", "new"),
        ("parts", "stepped"),
        ("whole", "copied"),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER],
    ],
)
def test_a_load_that_one_rank_refuses(ranks: Ranks, way: str, when: str) -> None:
    first, second = ranks(2, refused, way, when)
    for name, (_, own) in (FAULTS | OF_AN_ADAMW).items():
        assert "rank 1 of 2 could not load" in first[name], name
        assert own in second[name], name


def seeds(rank: int, way: str) -> str:
    opt, saved = new(way)[1], an_adamws(way)
    return error_of(opt.seed_from_adamw, of_other_shapes(saved) if rank == 1 else saved)


def of_another_max_size(rank: int, way: str) -> str:
    """Both load by themselves; together, they would make states of different blocks."""
    saved = [stepped(way, max_size)[1] for max_size in (4, 3)]
    for opt in saved:
        opt.consolidate_state_dict(to=None)
    return error_of(new(way)[1].load_state_dict, saved[rank].state_dict())


@pytest.mark.parametrize("way", ["whole", "parts"])
def test_ranks_that_would_make_different_states(ranks: Ranks, way: str) -> None:
    first, second = ranks(2, seeds, way)
    assert "rank 1 of 2 could not load" in first
    assert "has other shapes in the AdamW" in second
    for error in ranks(2, of_another_max_size, way):
        assert "group 0: max_size is 4 on rank 0, 3 on rank 1. Give those of one save" in error


def saved_before_a_step(rank: int, way: str, when: str) -> Any:
    """(entries without this rank's shards, what the label says) of a consolidated state."""
    expected, opt = a_whole(way) if when == "copied" else None, MADE[when](way)[1]
    opt.consolidate_state_dict(to=None)
    state = opt.state_dict()["state"]
    if expected is not None:
        assert_equal(state, expected["state"])
    return sum(len(own) for own in state.values()), Part.read(state[0]["shared/" + PART_KEY])[:2]


@pytest.mark.parametrize(
    ("way", "when"), [("parts", "new"), ("parts", "copied"), ("whole", "copied")]
)
def test_what_has_not_met_the_other_ranks_is_whole(ranks: Ranks, way: str, when: str) -> None:
    """Without a step the chain did not know yet that it shares, and gave a part as the whole."""
    (whole,) = ranks(1, saved_before_a_step, way, when)
    assert ranks(2, saved_before_a_step, way, when) == [whole] * 2


def frozen(rank: int, way: str) -> tuple[Any, Any]:
    """The parameters after a step from this rank's own part, and those of the run that saved it."""
    (params, opt), (again, loaded) = stepped(way), new(way)
    for one in (params, again):
        one[0].requires_grad_(False)
        one[4].requires_grad_(False)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(params, again):
        q.data.copy_(p.data)
    for one, stepper in ((params, opt), (again, loaded)):
        give_gradients(one, 2)
        stepper.step()
        one[0].requires_grad_(True)  # and it continues from the state that it had
        give_gradients(one, 3)
        stepper.step()
    return local(params), local(again)


@pytest.mark.parametrize("way", ["whole", "parts"])
def test_parts_with_frozen_parameters(ranks: Ranks, way: str) -> None:
    """Its blocks belong to one rank; the others took it for one that has had no state."""
    for expected, found in ranks(2, frozen, way):
        assert_equal(expected, found)
