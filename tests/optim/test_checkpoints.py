"""Checkpoints of the wrapper: all of it comes back, or nothing changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import funshampoo as fs
from funshampoo import linalg
from funshampoo.state import merged
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
from tests.optim.test_groups import flat, two_groups
from tests.optim.test_protocol import model_of, train


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def resumed(params: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: Parameter(p.detach().clone()) for name, p in params.items()}


def second_group(method: Method) -> dict[str, Any]:
    return {"lr": 0.01} if method.name == "bare" else {"lr": 0.01, "weight_decay": 0.2}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(m, torch.float64) for m in METHODS] + [(m, torch.bfloat16) for m in (EVERYTHING, ADAMW)],
    ids=[m.name for m in METHODS] + ["everything_bfloat16", "adamw_bfloat16"],
)
@pytest.mark.parametrize("steps", [0, 2, 3])  # before and after the refresh of step 3
def test_a_resumed_run_is_the_uninterrupted_one(
    method: Method, steps: int, dtype: torch.dtype
) -> None:
    params, grads = parameters(dtype), grads_of(7, dtype)
    optimizer = method.optimizer(two_groups(params, second_group(method)))
    run(optimizer, params, grads[:steps])
    again = resumed(params)
    saved = through_a_file(optimizer.state_dict())
    other = method.optimizer(two_groups(again, second_group(method)))
    other.load_state_dict(saved)
    run(optimizer, params, grads[steps:])
    run(other, again, grads[steps:])
    assert_same(params, again)
    assert_same(flat(optimizer), flat(other))


def test_scheduled_and_edited_numbers_come_back() -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = SHAMPOO.optimizer(params.items())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for g in grads[:4]:
        run(optimizer, params, [g])
        scheduler.step()
    optimizer.param_groups[0].update(betas=(0.5, 0.9), momentum=0.9)
    again = resumed(params)
    saved = through_a_file({"o": optimizer.state_dict(), "s": scheduler.state_dict()})
    other = SHAMPOO.optimizer(again.items())
    follower = torch.optim.lr_scheduler.ExponentialLR(other, 0.7)
    other.load_state_dict(saved["o"])
    follower.load_state_dict(saved["s"])
    for g in grads[4:]:
        run(optimizer, params, [g])
        run(other, again, [g])
        scheduler.step()
        follower.step()
    assert_same(params, again)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.param_groups[0]["betas"] == (0.5, 0.9)


def test_another_momentum_becomes_the_saved_one() -> None:
    """Either way: the saved group says which parts there are."""
    for saved_momentum, built in ((0.9, 0.0), (0.0, 0.9)):
        params, grads = parameters(), grads_of(6)
        optimizer = SHAMPOO.optimizer(params.items(), momentum=saved_momentum)
        run(optimizer, params, grads[:4])
        again = resumed(params)
        other = SHAMPOO.optimizer(again.items(), momentum=built)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["momentum"] == saved_momentum
        run(optimizer, params, grads[4:])
        run(other, again, grads[4:])
        assert_same(params, again)


def test_functions_given_at_construction_stay() -> None:
    """A text stands for them in a checkpoint, whether the saved run had some or not."""
    calls: list[str] = []
    newton = linalg.coupled_newton()

    def solver(A: Tensor, p: Any, epsilon: Any) -> Any:
        calls.append("solver")
        return newton(A, p, epsilon)

    def mask(tree: Any) -> Any:
        calls.append("mask")
        return {name: x.ndim > 1 for name, x in tree.items()}

    def distribute(*args: Any, **options: Any) -> Any:
        calls.append("distribute")
        return fs.sharded(*args, **options)

    functions = {"solver": solver, "mask": mask, "distribute": distribute}
    grads = grads_of(7)
    for source in ({}, functions):
        params = parameters()
        optimizer = EVERYTHING.optimizer(params.items(), **source)
        run(optimizer, params, grads[:4])
        saved = through_a_file(optimizer.state_dict())
        texts = {name: saved["param_groups"][0][name] for name in source}
        assert all("not saved: function" in text for text in texts.values())
        other = EVERYTHING.optimizer(params.items(), **functions)
        other.load_state_dict(saved)
        assert all(other.param_groups[0][name] is f for name, f in functions.items())
        calls.clear()
        run(other, params, grads[4:])
        assert {"solver", "mask"} <= set(calls)


def test_a_loaded_checkpoint_is_a_copy() -> None:
    params, grads = parameters(), grads_of(5)
    rate = torch.tensor(0.05, dtype=torch.float64)
    optimizer = SHAMPOO.optimizer(params.items(), lr=rate)
    run(optimizer, params, grads[:3])
    saved = optimizer.state_dict()
    state = copies(flat(optimizer))
    other = SHAMPOO.optimizer(resumed(params).items())
    other.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(7.0)
    again = dict(zip(params, other.param_groups[0]["params"]))
    run(other, again, grads[3:])
    assert float(rate) == 0.05
    assert_same(flat(optimizer), state)


Damage = Callable[[dict[str, Any]], Any]


def first_entry(saved: dict[str, Any], ending: str) -> tuple[dict[str, Any], str]:
    entries = saved["state"][0]
    return entries, next(name for name in entries if name.endswith(ending))


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(saved: dict[str, Any]) -> None:
        entries, name = first_entry(saved, ending)
        entries[name] = change(entries[name])

    return damage


def without(ending: str) -> Damage:
    def damage(saved: dict[str, Any]) -> None:
        entries, name = first_entry(saved, ending)
        del entries[name]

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "shape": (changed("ema/average", lambda x: x[..., :-1]), "p5/block_1/.*ema/average' has shape"),
    "dtype": (changed("ema/average", lambda x: x.float()), "cast=True converts it"),
    "missing": (without("ema/average"), "missing from the checkpoint.*ema/average"),
    "missing_parameter": (lambda s: s["state"].pop(2), "missing from the checkpoint"),
    "unknown": (lambda s: s["state"][1].update({"a/b": torch.zeros(2)}), "unknown to.*a/b"),
    "not_a_tensor": (lambda s: s["state"][1].update({"a/step": 3}), "p4/a/step' is no tensor"),
    "foreign_index": (lambda s: s["state"].update({99: {}}), "a state for 99"),
    "groups": (lambda s: s["param_groups"].pop(), "the same groups"),
    "group_size": (lambda s: s["param_groups"][1]["params"].pop(), "the same groups"),
    "out_of_range": (lambda s: s["param_groups"][1].update(lr=-1.0), "lr is -1.0"),
    "other_blocks": (lambda s: s["param_groups"][1].update(max_size=2), "another max_size"),
    "no_groups": (lambda s: s.pop("param_groups"), "no state_dict of an optimizer"),
    "not_flat": (lambda s: s.update({"state": {}}), "missing from the checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_an_error_that_changes_nothing(name: str) -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = SHAMPOO.optimizer(two_groups(params, {"lr": 0.01}))
    run(optimizer, params, grads[:3])
    saved = through_a_file(optimizer.state_dict())
    run(optimizer, params, grads[3:6])
    for group in saved["param_groups"]:
        group["lr"] = 0.5
    damage, message = DAMAGES[name]
    damage(saved)
    state = copies(flat(optimizer))
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert_same(flat(optimizer), state)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    run(optimizer, params, grads[6:])
    twins = parameters()
    run(SHAMPOO.optimizer(two_groups(twins, {"lr": 0.01})), twins, grads)
    assert_same(params, twins)


def test_a_checkpoint_of_torch_optim_is_an_error() -> None:
    params = parameters()
    adamw = torch.optim.AdamW(params.values())
    run(adamw, params, grads_of(1))
    sgd = torch.optim.SGD(params.values(), momentum=0.9)
    run(sgd, params, grads_of(1))
    for saved, message in (
        (adamw.state_dict(), r"seed_from_adamw\(state_dict\)"),
        (sgd.state_dict(), "missing from the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            fs.Optimizer(params.values(), fs.adamw).load_state_dict(saved)


def test_strict_and_cast_are_handed_on() -> None:
    params, grads = parameters(), grads_of(4)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads)
    saved = through_a_file(optimizer.state_dict())
    changed("ema/average", lambda x: x.float())(saved)
    optimizer.load_state_dict(saved, cast=True)
    entries, name = first_entry({"state": [optimizer.state[params["p5"]]]}, "ema/average")
    assert entries[name].dtype == torch.float64
    assert torch.equal(entries[name].float(), first_entry(saved, "ema/average")[0][name])
    without("ema/average")(saved)
    optimizer.load_state_dict(saved, strict=False)
    assert not optimizer.state[params["p5"]][name].any()  # as in a fresh state


def test_a_frozen_parameters_state_comes_back() -> None:
    params, grads = parameters(), grads_of(6)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads[:3])
    params["p3"].requires_grad_(False)
    saved = through_a_file(optimizer.state_dict())
    again = resumed(params)
    again["p3"].requires_grad_(False)
    other = SHAMPOO.optimizer(again.items())
    other.load_state_dict(saved)
    for p in (params["p3"], again["p3"]):
        p.requires_grad_(True)
    run(optimizer, params, grads[3:])
    run(other, again, grads[3:])
    assert_same(params, again)


def test_a_stage_may_be_called_shared() -> None:
    """As is the place where a counter stands with every parameter."""
    rate = fs.scale_by_learning_rate(lambda count: 0.1 / (1 + count))
    tx = fs.chain(("shared", fs.trace(0.9)), rate)
    params, grads = parameters(), grads_of(5)
    optimizer = fs.Optimizer(params.items(), tx)
    run(optimizer, params, grads[:3])
    assert optimizer.state[params["p0"]].keys() == {
        "shared/buffer",
        "shared/clock/steps",
    }
    again = resumed(params)
    other = fs.Optimizer(again.items(), tx)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params, grads[3:])
    run(other, again, grads[3:])
    assert_same(params, again)


def test_merged_parts_of_one_rank_load() -> None:
    params, grads = parameters(), grads_of(4)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads)
    whole = merged([optimizer.state_dict(), optimizer.state_dict()])
    other = SHAMPOO.optimizer(resumed(params).items())
    other.load_state_dict(whole)
    assert_same(flat(other), flat(optimizer))


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("method", [SHAMPOO, EVERYTHING, REFERENCE], ids=name_of)
def test_distributed_checkpoint_state_dicts(method: Method, flatten: bool) -> None:
    """By the parameters' full names, as torch.distributed.checkpoint has them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = model_of()
    optimizer = method.optimizer(model.parameters())
    train(model, optimizer, range(4))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert any("0.weight" in key for key in (saved if flatten else saved["state"]))
    again = model_of()
    again.load_state_dict(model.state_dict())
    other = method.optimizer(again.parameters())
    set_optimizer_state_dict(again, other, through_a_file(dict(saved)), options=options)
    train(model, optimizer, range(4, 8))
    before = copies(dict(again.named_parameters()))
    train(again, other, range(4, 8))
    assert moved(dict(again.named_parameters()), before)
    assert_same(dict(model.named_parameters()), dict(again.named_parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is")  # 2.8's own
@pytest.mark.parametrize("exponents", [{2: 1 / 3}, {1: 0.2, 2: {0: 0.5, 1: 0.25}}])
def test_numbers_as_keys_come_back_from_a_distributed_checkpoint(
    exponents: dict[int, Any], tmp_path: Path
) -> None:
    """Which makes strings of them, and leaves ours beside what it loads."""
    model, other = model_of(), model_of()
    ours = {
        key: 0.1 if isinstance(e, float) else dict.fromkeys(e, 0.1) for key, e in exponents.items()
    }
    saving = fs.Optimizer(model.parameters(), fs.shampoo, lr=0.01, exponents=exponents)
    loading = fs.Optimizer(other.parameters(), fs.shampoo, lr=0.01, exponents=ours)
    train(model, saving, range(3))
    train(other, loading, range(1))
    saved, into = get_optimizer_state_dict(model, saving), get_optimizer_state_dict(other, loading)
    dcp.save(saved, checkpoint_id=tmp_path)
    dcp.load(into, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, loading, into)
    other.load_state_dict(model.state_dict())
    assert loading.param_groups[0]["exponents"] == exponents
    train(model, saving, range(3, 6))
    train(other, loading, range(3, 6))
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


def saved_by(named: bool, steps: int = 3) -> tuple[dict[str, Any], dict[str, Parameter]]:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items() if named else params.values())
    run(optimizer, params, grads_of(steps))
    return through_a_file(optimizer.state_dict()), params


def test_names_are_adopted_or_kept() -> None:
    for named, ours in ((True, False), (False, True), (True, True), (False, False)):
        saved, params = saved_by(named)
        again = resumed(params)
        optimizer = SHAMPOO.optimizer(again.items() if ours else again.values())
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0].get("param_names") == (
            list(params) if named or ours else None
        )
        twins = resumed(params)
        twin = SHAMPOO.optimizer(twins.items())
        twin.load_state_dict(saved_by(True)[0])
        run(optimizer, again, grads_of(4, seed=7))
        run(twin, twins, grads_of(4, seed=7))
        assert_same(again, twins)
        names = optimizer.chain_states()[0]["blocked"].layout.keys()
        assert set(names) == (set(params) if named or ours else {f"param_{i}" for i in range(6)})


def test_by_name_where_both_have_names() -> None:
    """torch.optim goes by order, and would give the averages of one to another of its shape."""
    saved, params = saved_by(True)
    again = dict(sorted(resumed(params).items()))
    assert list(again) != list(params)
    optimizer = SHAMPOO.optimizer(again.items())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == list(again)
    twins = resumed(params)
    twin = SHAMPOO.optimizer(twins.items())
    twin.load_state_dict(saved)
    run(optimizer, again, grads_of(4, seed=7))
    run(twin, twins, grads_of(4, seed=7))
    assert_same({name: again[name] for name in twins}, twins)


def test_names_that_stand_for_others_are_an_error() -> None:
    saved, params = saved_by(True)
    renamed = {f"net.{name}": p for name, p in resumed(params).items()}
    with pytest.warns(UserWarning, match="'p5'.*'net.p5'.*by order"):
        SHAMPOO.optimizer(renamed.items()).load_state_dict(saved)  # no name is known here
    names = list(params)
    partly = dict(zip(["other", names[0], *names[2:]], resumed(params).values()))
    with pytest.raises(ValueError, match=rf"parameter 0 is '{names[0]}', the optimizer's is 'oth"):
        SHAMPOO.optimizer(partly.items()).load_state_dict(saved)


@pytest.mark.parametrize("rate", [torch.tensor(0.05), torch.tensor([0.05])], ids=["()", "(1,)"])
def test_a_rate_that_is_a_tensor_is_saved_and_loaded(rate: Tensor) -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items(), lr=rate)
    run(optimizer, params, grads_of(3))
    saved = through_a_file(optimizer.state_dict())
    again = resumed(params)
    other = SHAMPOO.optimizer(again.items(), lr=torch.tensor(9.0))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] is not rate
    run(optimizer, params, grads_of(3, seed=7))
    run(other, again, grads_of(3, seed=7))
    assert_same(params, again)


def test_a_named_adamw_seeds_an_optimizer_without_names() -> None:
    params = {name: p for name, p in parameters().items() if p.ndim}
    adamw = torch.optim.AdamW(list(params.items()))
    run(adamw, params, [{n: g[n] for n in params} for g in grads_of(2)])
    for accept in (False, True):
        optimizer = SHAMPOO.optimizer(params.values(), accept_adamw=accept)
        if accept:
            optimizer.load_state_dict(adamw.state_dict())
        else:
            optimizer.seed_from_adamw(adamw.state_dict())
        second = next(n for n in optimizer.state[params["p5"]] if n.endswith("onto/second"))
        assert optimizer.state[params["p5"]][second].any()


def test_what_loads_without_strict_can_be_saved_and_loaded() -> None:
    """Counts of a checkpoint without a clock are cut to the clock that there is."""
    without, with_clock = (fs.blocked(fs.guarded(fs.trace(0.9), max_failures=m)) for m in (None, 9))
    params = {"w": torch.zeros(3)}
    state = without.init(params)
    for _ in range(5):
        _, state = without.update({"w": torch.full((3,), torch.nan)}, state, params)
    saved = fs.state.state_dict(state)
    loaded = fs.state.load_state_dict(with_clock.init(params), saved, strict=False).state
    fs.state.check(loaded)
    fs.state.load_state_dict(with_clock.init(params), fs.state.state_dict(loaded))


def test_by_name_over_groups() -> None:
    """A parameter that stands in another group here has its own state all the same."""
    params, grads = parameters(), grads_of(3)
    names = list(params)
    parts = [names[:3], names[3:]]
    optimizer = ADAMW.optimizer([{"params": [(n, params[n]) for n in part]} for part in parts])
    run(optimizer, params, grads)
    saved = through_a_file(optimizer.state_dict())
    other = ADAMW.optimizer([{"params": [(n, params[n]) for n in part]} for part in parts[::-1]])
    other.load_state_dict(saved)
    for p in params.values():
        assert_same(dict(other.state[p]), dict(optimizer.state[p]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["state"].update({0: None}),
        lambda s: s.update(param_groups=None),
        lambda s: s["param_groups"][0].pop("params"),
        lambda s: s.update(state=[]),
    ],
)
def test_what_is_no_state_dict_says_so(damage: Damage) -> None:
    saved, params = saved_by(True)
    damage(saved)
    with pytest.raises(ValueError, match="no state_dict of an optimizer"):
        SHAMPOO.optimizer(params.items()).load_state_dict(saved)


def test_a_consolidated_state_is_of_the_groups_as_they_are() -> None:
    params = [Parameter(torch.full((2,), float(i))) for i in range(2)]
    optimizer = fs.Optimizer(
        [{"params": params[:1]}, {"params": params[1:]}], fs.adamw, consolidate=True
    )
    for i, p in enumerate(params):
        p.grad = torch.full((2,), i + 1.0)
    optimizer.step()
    optimizer.state_dict()
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    seconds = [float(optimizer.state[p]["scale_by_adam/second"][0]) for p in params]
    assert seconds[0] < seconds[1]


def test_a_load_that_fails_leaves_the_names() -> None:
    saved, params = saved_by(True)
    optimizer = SHAMPOO.optimizer(params.values())
    run(optimizer, params, grads_of(2))
    first_entry(saved, "ema/average")[0]["a/b"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown to the state"):
        optimizer.load_state_dict(saved)
    run(optimizer, params, grads_of(1))
    assert set(optimizer.chain_states()[0]["blocked"].layout) == {f"param_{i}" for i in range(6)}


def test_a_note_of_a_frozen_parameter_is_no_state() -> None:
    """The label of the group may stand beside it, under the name of a shared entry."""
    frozen = Parameter(torch.ones(2, 3), requires_grad=False)
    params = [frozen, Parameter(torch.ones(2, 3))]
    optimizer = fs.Shampoo(params, lr=0.1)
    optimizer.state[frozen]["rho"] = 0.5
    params[1].grad = torch.ones(2, 3)
    optimizer.step()
    again = fs.Shampoo(params, lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert dict(again.state[frozen]) == {"rho": 0.5}
