"""optimizer.state: what is written to it counts, as in torch.optim."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from tests.optim.runs import (
    ADAMW,
    EVERYTHING,
    METHODS,
    REFERENCE,
    SHAMPOO,
    Method,
    assert_same,
    copies,
    grads_of,
    moved,
    name_of,
    parameters,
    run,
)
from tests.optim.test_checkpoints import resumed, through_a_file

Reset = Callable[[fs.Optimizer, Any], None]


def assign_state(optimizer: fs.Optimizer, params: Any) -> None:
    optimizer.state = defaultdict(dict)


def assign_empty_everywhere(optimizer: fs.Optimizer, params: Any) -> None:
    for p in params.values():
        optimizer.state[p] = {}
    optimizer.state.clear()  # the counters, too


ALL: dict[str, Reset] = {
    "clear": lambda optimizer, _: optimizer.state.clear(),
    "defaultdict": assign_state,
    "dict": lambda optimizer, _: setattr(optimizer, "state", {}),
    "each": assign_empty_everywhere,
}
ONE: dict[str, Callable[[fs.Optimizer, Any], Any]] = {
    "del": lambda optimizer, p: optimizer.state.__delitem__(p),
    "pop": lambda optimizer, p: optimizer.state.pop(p),
    "empty": lambda optimizer, p: optimizer.state.__setitem__(p, {}),
    "clear": lambda optimizer, p: optimizer.state[p].clear(),
    "without_it": lambda optimizer, p: setattr(
        optimizer, "state", {q: e for q, e in optimizer.state.items() if q is not p}
    ),
}


@pytest.mark.parametrize("reset", ALL)
@pytest.mark.parametrize("method", [EVERYTHING, ADAMW, REFERENCE], ids=name_of)
def test_everything_starts_from_nothing(method: Method, reset: str) -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = method.optimizer(params.items())
    run(optimizer, params, grads[:4])
    ALL[reset](optimizer, params)
    assert not optimizer.state
    assert len(optimizer.state[params["p5"]]) == 0
    twins = resumed(params)
    run(optimizer, params, grads[4:])
    run(method.optimizer(twins.items()), twins, grads[4:])
    assert_same(params, twins)
    assert params["p5"] in optimizer.state


@pytest.mark.parametrize("reset", ONE)
@pytest.mark.parametrize("method", [EVERYTHING, ADAMW], ids=name_of)
def test_one_parameter_starts_from_nothing(method: Method, reset: str) -> None:
    """As it would in an optimizer of its own that refreshes on the same steps; others go on."""
    params, twins, grads = parameters(), parameters(), grads_of(8)
    changes = {"every": 1} if "every" in method.options else {}
    optimizer = method.optimizer(params.items(), **changes)
    other = method.optimizer(twins.items(), **changes)
    run(optimizer, params, grads[:4])
    run(other, twins, grads[:4])
    ONE[reset](optimizer, params["p3"])
    assert params["p3"] not in optimizer.state
    alone = {"p3": torch.nn.Parameter(params["p3"].detach().clone())}
    run(optimizer, params, grads[4:])
    run(other, twins, grads[4:])
    run(method.optimizer(alone.items(), **changes), alone, [{"p3": g["p3"]} for g in grads[4:]])
    assert moved({"p3": params["p3"]}, twins)
    assert_same({"p3": params["p3"]}, alone, 1e-10)
    del params["p3"], twins["p3"]
    assert_same(params, twins)


def test_an_entry_is_changed() -> None:
    """Through the dict, through its tensor, by update and by |=: all are one memory."""
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    name = "scale_by_adam/second"
    p = params["p5"]
    shape = optimizer.state[p][name].shape

    def now() -> float:
        return float(optimizer.chain_states()[0]["scale_by_adam"].second["p5"].flatten()[0])

    for i, change in enumerate(
        (
            lambda x: optimizer.state[p].__setitem__(name, x),
            lambda x: optimizer.state[p].update({name: x}),
            lambda x: optimizer.state[p].__ior__({name: x}),
            lambda x: optimizer.state[p][name].copy_(x),
            lambda x: optimizer.state.__setitem__(p, {**optimizer.state[p], name: x}),
        )
    ):
        change(torch.full(shape, i + 2.0, dtype=torch.float64))
        assert now() == i + 2.0
        assert float(optimizer.state[p][name].flatten()[0]) == i + 2.0
    del optimizer.state[p][name]
    assert now() == 0.0
    assert float(optimizer.state[p]["scale_by_adam/second_weight"]) > 0


def test_what_does_not_fit_is_an_error_that_changes_nothing() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    p = params["p5"]
    before = {name: x.clone() for name, x in optimizer.state[p].items()}
    name = next(name for name in before if name.endswith("average"))
    x = before[name]
    for wrong, value, error, message in (
        (name, x[:-1], ValueError, "the value is .* of shape"),
        (name, x.float(), ValueError, "is torch.float64 of shape"),
        (name, 3.0, TypeError, "is a tensor of the optimizer's state"),
        (name + "s", x, KeyError, f"did you mean '{name}'"),
    ):
        with pytest.raises(error, match=message):
            optimizer.state[p].update({"note": 1, name: x + 1, wrong: value})
        with pytest.raises(error, match=message):
            optimizer.state[p] = {**before, wrong: value}
    assert "note" not in optimizer.state[p]
    assert_same(dict(optimizer.state[p]), before)
    with pytest.raises(TypeError, match="a mapping of names"):
        optimizer.state[p] = x
    with pytest.raises(KeyError):
        del optimizer.state[torch.zeros(1)]
    with pytest.raises(KeyError):
        del optimizer.state[p]["note"]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_notes_of_a_client_stay_are_saved_and_loaded(method: Method) -> None:
    """Such as SAM's copy of the parameters, or a switch's slow weights."""
    params, grads = parameters(), grads_of(6)
    optimizer = method.optimizer(params.items())
    for p in params.values():
        optimizer.state[p]["old_p"] = p.detach().clone()
    optimizer.state[params["p0"]]["count"] = 3
    start = copies(params)
    run(optimizer, params, grads[:3])
    saved = through_a_file(optimizer.state_dict())
    again = resumed(params)
    other = method.optimizer(again.items())
    other.load_state_dict(saved)
    for one, those in ((optimizer, params), (other, again), (copy.deepcopy(optimizer), None)):
        those = those or dict(zip(params, one.param_groups[0]["params"]))
        assert_same({n: one.state[p]["old_p"] for n, p in those.items()}, start)
        assert one.state[those["p0"]]["count"] == 3
        assert one.state[those["p0"]].pop("count") == 3
        assert "count" not in one.state[those["p0"]]
    run(optimizer, params, grads[3:])
    run(other, again, grads[3:])
    twins = parameters()
    run(method.optimizer(twins.items()), twins, grads)
    assert_same(params, twins)
    assert_same(again, twins)


def test_of_a_tensor_that_is_in_no_group() -> None:
    optimizer = SHAMPOO.optimizer(parameters().items())
    stranger = torch.zeros(2)
    assert optimizer.state[stranger] == {}
    assert stranger not in optimizer.state
    optimizer.state[stranger]["ema"] = 0.5
    assert optimizer.state[stranger] == {"ema": 0.5}
    assert any(p is stranger for p in optimizer.state)


def test_reads_as_a_dict() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    state = optimizer.state
    assert len(state) == len(params)
    assert [p is q for p, q in zip(state, params.values())]
    entries = state[params["p5"]]
    assert isinstance(entries, dict)
    for other in (copy.copy(entries), copy.deepcopy(entries), pickle.loads(pickle.dumps(entries))):
        assert type(other) is dict
        assert_same(other, dict(entries))
    before = copies(dict(entries))
    copy.deepcopy(entries).clear()
    assert_same(dict(state[params["p5"]]), before)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_reading_makes_nothing_that_training_keeps(method: Method, mode: Any) -> None:
    """In whatever mode, before the first step: no inference tensors, no old values."""
    params, twins, grads = parameters(), parameters(), grads_of(4)
    optimizer = method.optimizer(params.items())
    with mode():
        optimizer.state_dict()
        optimizer.chain_states()
        assert all(not x.requires_grad for e in optimizer.state.values() for x in e.values())
    for p in params.values():  # as a checkpoint of the model does that is loaded afterwards
        p.data = p.data + 1
    for p in twins.values():
        p.data = p.data + 1
    run(optimizer, params, grads)
    run(method.optimizer(twins.items()), twins, grads)
    assert_same(params, twins)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("loads", [False, True], ids=["saved", "saved and loaded"])
def test_what_is_replaced_before_the_first_step_is_forgotten(method: Method, loads: bool) -> None:
    """As Accelerate does: it saves, loads, and puts shards in the places of whole parameters."""
    params, shards, twins, grads = parameters(), parameters(), parameters(), grads_of(4)
    optimizer = method.optimizer(params.items())
    saved = optimizer.state_dict()
    if loads:
        optimizer.load_state_dict(copy.deepcopy(saved))
    optimizer.param_groups[0]["params"] = list(shards.values())
    whole = [weakref.ref(p) for p in params.values()]
    params.clear()
    del saved
    run(optimizer, shards, grads)
    gc.collect()
    assert not any(ref() is not None for ref in whole)
    run(method.optimizer(twins.items()), twins, grads)
    assert_same(shards, twins)


def test_what_starts_anew_elsewhere_is_not_kept_alive() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    gone, params["p5"].grad = weakref.ref(params["p5"]), None
    own = optimizer.param_groups[0]["params"]
    own[:] = [p for p in own if p is not params["p5"]]
    optimizer.state[params.pop("p5")] = {}
    optimizer.step()
    gc.collect()
    assert gone() is None


def keeps_start() -> fs.GradientTransformation:
    """W0 - W in the update's place: a state that depends on the parameters, as averages do."""

    def init(params: Any) -> Any:
        return {name: p.clone() for name, p in params.items()}

    def update(updates: Any, state: Any, params: Any) -> Any:
        return {name: state[name] - p - 1 for name, p in params.items()}, state

    return fs.GradientTransformation(init, update)


def test_a_state_of_the_parameters_is_made_at_the_first_step() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = fs.Optimizer([p], keeps_start(), lr=None)
    optimizer.state_dict()
    with torch.no_grad():
        p.fill_(5.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 4.0))


def test_a_write_after_a_reset_stays() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    p = params["p5"]
    saved = {name: torch.full_like(x, 7.0) for name, x in optimizer.state[p].items() if x.ndim}
    del optimizer.state[p]
    optimizer.state[p] = saved
    p.grad = None
    optimizer.step()
    assert all(bool((optimizer.state[p][name] == 7.0).all()) for name in saved)


def test_what_left_a_group_may_be_written_to_entry_by_entry() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    p = optimizer.param_groups[0]["params"].pop(0)
    optimizer.step()
    before = {name: x.clone() for name, x in optimizer.state[p].items()}
    optimizer.state[p]["rho"] = 0.5
    name = "scale_by_adam/second"
    optimizer.state[p][name] = before[name] + 1
    del optimizer.state[p]["rho"]
    assert optimizer.state[p].pop("absent", None) is None
    assert optimizer.state[p].keys() == before.keys()
    for entry, x in optimizer.state[p].items():
        assert torch.equal(x, before[entry] + (1 if entry == name else 0))


@pytest.mark.parametrize("entry", [7.0, None], ids=["assigned", "deleted"])
@pytest.mark.parametrize("whole", [False, True], ids=["parameter", "group"])
def test_what_waits_for_a_step_goes_along_with_what_leaves(
    entry: float | None, whole: bool
) -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    p, name = params["p5"], "scale_by_adam/second"
    if entry is None:
        del optimizer.state[p]
    else:
        optimizer.state[p] = {name: torch.full_like(optimizer.state[p][name], entry)}
    own = optimizer.param_groups[0]["params"]
    own[:] = [] if whole else [q for q in own if q is not p]
    if whole:
        optimizer.param_groups.clear()
    optimizer.state_dict()
    found = optimizer.state[p].get(name)
    assert found is None if entry is None else bool((found == entry).all())


def test_what_is_shared_is_not_one_parameters_to_forget() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads_of(3))
    p = params["p5"]
    own = {name: x for name, x in optimizer.state[p].items() if not name.startswith("shared/")}
    optimizer.state[p] = own
    assert int(optimizer.state[p]["shared/clock/steps"]) == 3


def test_assigning_all_is_all_or_nothing() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    before = copies(dict(optimizer.state[params["p5"]]))
    given = {p: dict(entries) for p, entries in optimizer.state.items()}
    given[params["p5"]] = {n: x + 1 for n, x in given[params["p5"]].items()}
    given[params["p0"]]["scale_by_adam/second"] = torch.zeros(9)
    with pytest.raises(ValueError, match="of shape"):
        optimizer.state = given
    assert_same(dict(optimizer.state[params["p5"]]), before)


def test_parameters_that_moved_count_as_a_step_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no tensor of the state was written to."""

    def update(updates: Any, state: Any) -> Any:
        return updates, {name: x + 1 for name, x in state.items()}

    tx = fs.GradientTransformation(lambda params: {n: p * 0 for n, p in params.items()}, update)
    params = {name: torch.ones(2) for name in "ab"}
    state = tx.init(params)

    def interrupted(targets: Any, others: Any) -> None:
        targets[0].add_(others[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_add_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fs.update_in_place(tx, {n: torch.ones(2) for n in params}, state, params)
    monkeypatch.undo()
    with pytest.raises(fs.InterruptedStepError):
        tx.update({n: torch.ones(2) for n in params}, state, params)
    with pytest.raises(fs.InterruptedStepError):
        fs.state.state_dict(state)


def moments(optimizer: fs.Optimizer, p: Tensor) -> Tensor:
    found: Tensor = optimizer.state[p]["scale_by_adam/second"]
    return found.clone()


@pytest.mark.parametrize("whole", [False, True])
def test_entries_may_be_swapped(whole: bool) -> None:
    """What is assigned are views of what is replaced."""
    params = {name: torch.nn.Parameter(torch.ones(3)) for name in "ab"}
    optimizer = fs.Optimizer(params.items(), fs.adamw, lr=0.1)
    for name, p in params.items():
        p.grad = torch.full((3,), 1.0 if name == "a" else 5.0)
    optimizer.step()
    a, b = params.values()
    first, second = moments(optimizer, a), moments(optimizer, b)
    if whole:
        optimizer.state = {a: optimizer.state[b], b: optimizer.state[a]}
    else:
        optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]
    for _ in range(2):  # as it is, and after a save
        assert torch.equal(moments(optimizer, a), second)
        assert torch.equal(moments(optimizer, b), first)
        optimizer.state_dict()
    a.grad = b.grad = None
    optimizer.step()
    assert torch.equal(moments(optimizer, a), second)


@pytest.mark.parametrize(
    "put",
    [
        lambda optimizer, p, entries: optimizer.state.__setitem__(p, entries),
        lambda optimizer, p, entries: optimizer.state[p].update(entries),
        lambda optimizer, p, entries: setattr(optimizer, "state", {p: entries}),
    ],
    ids=["assigned", "updated", "all"],
)
def test_saved_entries_may_be_assigned(put: Callable[[Any, Tensor, Any], None]) -> None:
    """As ZeroRedundancyOptimizer loads them: with the label that says which part they are of."""
    params, grads = parameters(), grads_of(4)
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads)
    saved = copy.deepcopy(optimizer.state_dict())["state"][0]
    run(optimizer, params, grads)
    first = next(iter(params.values()))
    part = {**saved, "shared/funshampoo/part": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="the part of rank 1 of 2"):
        put(optimizer, first, part)
    put(optimizer, first, saved)
    found = dict(optimizer.state[first])
    assert_same(found, {name: saved[name] for name in found})
    assert len(found) == len(saved) - 1  # but for the label


def test_a_write_to_a_new_group_leaves_what_the_others_bring() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fs.Optimizer([{"params": params[:2]}, {"params": params[2:]}], fs.adamw, lr=0.1)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    p, q = optimizer.param_groups[0]["params"].pop(0), torch.nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3)
    optimizer.add_param_group({"params": [q, p]})
    optimizer.state[q]["scale_by_adam/second"] = torch.ones(3)
    optimizer.step()
    weight = optimizer.state[p]["scale_by_adam/second_weight"]
    assert abs(float(weight) - (1 - 0.999**2)) < 1e-6  # of two steps
    optimizer.param_groups.pop()
    assert torch.equal(optimizer.state[p]["scale_by_adam/second_weight"], weight)


def rewrite(optimizer: fs.Optimizer, p: Tensor) -> None:
    optimizer.state[p] = {name: x.clone() for name, x in optimizer.state[p].items()}


def write_one(optimizer: fs.Optimizer, p: Tensor) -> None:
    name = next(name for name in optimizer.state[p] if not name.startswith("shared/"))
    optimizer.state[p][name] = optimizer.state[p][name].clone()


def write_in_place(optimizer: fs.Optimizer, p: Tensor) -> None:
    next(iter(optimizer.state[p].values())).add_(0)


@pytest.mark.parametrize("write", [rewrite, write_one, write_in_place])
def test_a_write_to_a_new_group_leaves_the_count_that_the_others_bring(
    write: Callable[[fs.Optimizer, Tensor], None],
) -> None:
    """Else roots were refreshed on other steps, and grafting began once more."""
    found = []
    for writes in (False, True):
        params, grads = parameters(), grads_of(6)
        optimizer = fs.Shampoo(params.items(), lr=0.1, every=2, start=3, max_size=4)
        run(optimizer, params, grads[:4])
        own = optimizer.param_groups[0]["params"]
        new = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        optimizer.add_param_group({"params": [("new", new)]})
        optimizer.param_groups[1]["params"] += [own.pop(), own.pop()]
        optimizer.param_groups[1]["param_names"] += list(params)[-2:]
        del optimizer.param_groups[0]["param_names"][-2:]
        if writes:
            for p in optimizer.param_groups[1]["params"][: 1 if write is write_in_place else None]:
                write(optimizer, p)
        run(optimizer, {**params, "new": new}, [{**g, "new": new.detach() * 2} for g in grads[4:]])
        found.append({**params, "new": new})
    assert_same(*found)


def test_what_is_read_may_be_written_back_after_a_move() -> None:
    """Also what the new group has no place for, which the next step leaves out."""
    found = []
    for writes in (False, True):
        params, grads = parameters(), grads_of(3)
        optimizer = fs.Optimizer(params.items(), fs.sgd, lr=0.1, momentum=0.9)
        run(optimizer, params, grads[:2])
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "momentum": 0.0}
        if writes:
            for p in params.values():
                rewrite(optimizer, p)
        run(optimizer, params, grads[2:])
        found.append(params)
    assert_same(*found)


def test_what_was_assigned_is_checked_like_what_is_there() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    p, name = params["p5"], "scale_by_adam/second"
    optimizer.state[p] = {n: x + 1 for n, x in optimizer.state[p].items() if x.ndim}
    for wrong, error in (
        ({name: torch.zeros(9)}, ValueError),
        ({"scale_by_adam/secnd": optimizer.state[p][name]}, KeyError),
    ):
        with pytest.raises(error):
            optimizer.state[p].update(wrong)
        with pytest.raises(error):
            optimizer.state[p] = wrong
    run(optimizer, params, grads_of(1))


def test_a_copy_with_a_reset_goes_on() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    del optimizer.state[params["p5"]]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    other = copy.deepcopy(optimizer)
    p = other.param_groups[0]["params"][1]
    del other.state[p][next(n for n in other.state[p] if n.endswith("average"))]
    other.step()


def test_what_is_not_there_is_not_there() -> None:
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    run(optimizer, params, grads_of(1))
    stranger = torch.zeros(1)
    assert optimizer.state.get(stranger) is None
    assert optimizer.state.get(stranger, 3) == 3
    assert optimizer.state.pop(stranger, None) is None
    with pytest.raises(KeyError):
        optimizer.state.pop(stranger)
    popped = optimizer.state.pop(params["p5"])
    assert popped["scale_by_adam/second"].any()
    assert optimizer.state.pop(params["p5"], None) is None


def test_seeded_moments_are_there_after_a_reset() -> None:
    params = {n: p for n, p in parameters().items() if p.ndim}
    adamw = torch.optim.AdamW(params.values())
    grads = [{n: g[n] for n in params} for g in grads_of(2)]
    run(adamw, params, grads)
    optimizer = ADAMW.optimizer(params.items(), accept_adamw=True)
    run(optimizer, params, grads)
    optimizer.state.clear()
    optimizer.seed_from_adamw(adamw.state_dict())
    assert len(optimizer.state) == len(params)
    bad = copy.deepcopy(adamw.state_dict())
    bad["state"][0]["exp_avg_sq"] -= 5.0
    with pytest.raises(ValueError, match="negative"):
        optimizer.load_state_dict(bad)
    bad = copy.deepcopy(adamw.state_dict())
    bad["param_groups"][0]["lr"] = "x"
    with pytest.raises(TypeError, match="lr is 'x'"):
        optimizer.load_state_dict(bad)


def _copied(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def _saved(optimizer: Any) -> Any:
    optimizer.state_dict()
    return optimizer


def _read(optimizer: Any) -> Any:
    optimizer.chain_states()
    len(optimizer.state)
    return optimizer


@pytest.mark.parametrize("after", [lambda o: o, _copied, _saved, _read])
@pytest.mark.parametrize("before", [lambda o: o, _copied, _saved, _read])
@pytest.mark.parametrize("method", [SHAMPOO, ADAMW], ids=name_of)
def test_a_write_in_place_before_the_first_step_counts(
    method: Method, before: Any, after: Any
) -> None:
    """As an assignment does. Whatever is done before it and between it and the step."""
    found = []
    for in_place in (True, False):
        optimizer = before(method.optimizer(parameters().values()))
        p = optimizer.param_groups[0]["params"][1]
        entries = optimizer.state[p]
        name = next(n for n, x in entries.items() if n.endswith("second"))
        if in_place:
            entries[name].fill_(7.0)
        else:
            entries[name] = torch.full_like(entries[name], 7.0)
        optimizer = after(optimizer)
        params = optimizer.param_groups[0]["params"]
        assert float(optimizer.state[params[1]][name].min()) == 7.0
        for q in params:
            q.grad = torch.ones_like(q)
        optimizer.step()
        assert float(optimizer.state[params[1]][name].min()) > 1.0
        found.append([q.detach() for q in params])
    assert all(map(torch.equal, *found))
