"""A run of torch.optim.AdamW goes on under the wrapper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import funshampoo as fs
from tests.optim.runs import assert_same, copies, grads_of, moved, parameters, run
from tests.optim.test_groups import two_groups

OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}


def adamw_run(params: Any, steps: int, **options: Any) -> torch.optim.AdamW:
    adamw = torch.optim.AdamW(params.values(), **{**OPTIONS, **options})
    run(adamw, params, grads_of(steps))
    return adamw


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("in_groups", [False, True], ids=["one_group", "two_groups"])
def test_adamw_goes_on(steps: int, in_groups: bool) -> None:
    params = parameters()
    adamw = adamw_run(params, steps)
    twins = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    given = two_groups(twins, {}) if in_groups else list(twins.values())
    optimizer = fs.Optimizer(given, fs.adamw, **OPTIONS)
    optimizer.seed_from_adamw(adamw.state_dict())
    more = grads_of(10, seed=200)
    run(adamw, params, more)
    run(optimizer, twins, more)
    assert_same(params, twins, 1e-12)


def test_groups_with_the_same_names_keep_their_own_moments() -> None:
    """As of two models in one optimizer: both have a "weight"."""
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(3))]
    adamw = torch.optim.AdamW(params, lr=0.1)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i)
    adamw.step()
    groups = [{"params": [("weight", p)]} for p in params]
    optimizer = fs.Optimizer(groups, fs.adamw)
    optimizer.seed_from_adamw(adamw.state_dict())
    for p in params:
        moment = optimizer.state[p]["scale_by_adam/second"]
        assert torch.equal(moment, adamw.state[p]["exp_avg_sq"])
        assert moment.any()


@pytest.mark.parametrize("merge", ["none", "small", "matrix"])
def test_the_grafting_of_shampoo_starts_with_adamws_second_moment(merge: str) -> None:
    """Block by block, also where the last block along a side is ragged."""
    params = {
        "matrix": Parameter(torch.randn(6, 5, dtype=torch.float64)),
        "kernel": Parameter(torch.randn(5, 3, 2, dtype=torch.float64)),
        "bias": Parameter(torch.randn(9, dtype=torch.float64)),
    }
    adamw = torch.optim.AdamW(params.values(), **OPTIONS)
    for step in range(3):
        for i, p in enumerate(params.values()):
            generator = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        adamw.step()
    optimizer = fs.Shampoo(params.items(), betas=OPTIONS["betas"], max_size=4, merge=merge)
    optimizer.seed_from_adamw(adamw.state_dict())
    kernel = {"none": (5, 3, 2), "small": (5, 3, 2), "matrix": (5, 6)}[merge]
    merged = {"matrix": (6, 5), "kernel": kernel, "bias": (9,)}
    for name, p in params.items():
        state = optimizer.state[p]
        found = 0
        for field, moment in (("graft/onto/second", "exp_avg_sq"), ("ema/average", "exp_avg")):
            whole = adamw.state[p][moment].reshape(merged[name])
            for entry, x in state.items():
                if not entry.endswith(field):
                    continue
                at = [int(i) for i in entry.split("/")[0].split("_")[1:]]
                block = whole[tuple(slice(4 * i, 4 * i + 4) for i in at)]
                assert torch.equal(x, block), entry
                found += 1
        expected = 1
        for side in merged[name]:
            expected *= -(-side // 4)
        assert found == 2 * expected
        weights = {e.rsplit("/", 1)[1]: x for e, x in state.items() if "/onto/" in e}
        assert float(weights["second_weight"]) == pytest.approx(1 - 0.95**3, rel=1e-14)
        filters = [x for e, x in state.items() if e.endswith("ema/weight")]
        assert [float(x) for x in filters] == pytest.approx([1 - 0.8**3] * expected, rel=1e-14)


def test_a_parameter_that_adamw_has_not_moved_starts_fresh() -> None:
    params = parameters()
    adamw = torch.optim.AdamW(params.values(), **OPTIONS)
    grads = [{n: x for n, x in g.items() if n != "p3"} for g in grads_of(2)]
    run(adamw, params, grads)
    optimizer = fs.Optimizer(params.items(), fs.adamw, **OPTIONS)
    optimizer.seed_from_adamw(adamw.state_dict())
    assert not optimizer.state[params["p3"]]["scale_by_adam/second"].any()
    assert optimizer.state[params["p4"]]["scale_by_adam/second"].any()


def test_a_listing_with_a_parameter_twice() -> None:
    w, v = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        adamw = torch.optim.AdamW([w, v, w])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fs.Optimizer([w, v, w], fs.adamw)
    w.grad, v.grad = torch.ones(3), torch.ones(3)
    adamw.step()
    optimizer.seed_from_adamw(adamw.state_dict())
    for p in (w, v):
        second = optimizer.state[p]["scale_by_adam/second"]
        assert torch.equal(second, adamw.state[p]["exp_avg_sq"])


def _named(params: Any) -> Any:
    return torch.optim.AdamW(list(params.items()), **OPTIONS)


def _wrong(kind: str, params: Any) -> Any:
    if kind == "order":
        return adamw_run(dict(reversed(params.items())), 2)
    if kind == "other_names":
        other = {f"{name}x" if name == "p5" else name: p for name, p in params.items()}
        adamw = _named(other)
        run(adamw, other, grads_of(2))
        return adamw
    if kind == "number":
        return adamw_run({name: params[name] for name in ("p5", "p4")}, 2)
    if kind == "amsgrad":
        return adamw_run(params, 2, amsgrad=True)
    if kind == "own":  # fits, but steps were made here
        return adamw_run(params, 2)
    if kind == "no_steps":
        return adamw_run(params, 0)
    if kind == "soap":  # whose published code has the moments under AdamW's names
        soap = adamw_run(params, 2)
        for entry in soap.state.values():
            entry |= {"GG": [], "Q": []}
        return soap
    sgd = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
    run(sgd, params, grads_of(2))
    return sgd


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("order", "other shapes in the AdamW"),
        ("other_names", "'p5' is a parameter of this optimizer alone"),
        ("number", "the AdamW has 2 parameters"),
        ("amsgrad", "amsgrad"),
        ("no_steps", "no moments"),
        ("sgd", r"of 'p\w' has no exp_avg, .*step, but \['momentum_buffer'\].*no state_dict of"),
        ("soap", "has GG, Q: these are the moments of a SOAP"),
        ("own", r"has moments already \('.*tx.init\(params\), .*optimizer.state.clear\(\)"),
    ],
)
@pytest.mark.parametrize("method", [fs.adamw, fs.shampoo])
def test_what_does_not_fit_is_an_error_that_changes_nothing(
    method: Any, kind: str, message: str
) -> None:
    """As it is, and in blocks, which are cut from the moments."""
    params = parameters()
    wrong = _wrong(kind, parameters())
    optimizer = fs.Optimizer(params.items(), method, **OPTIONS)
    run(optimizer, params, grads_of(2))
    state = {n: x.clone() for p in params.values() for n, x in optimizer.state[p].items()}
    before = copies(params)
    with pytest.raises(ValueError, match=message):
        optimizer.seed_from_adamw(wrong.state_dict())
    now = {n: x for p in params.values() for n, x in optimizer.state[p].items()}
    assert_same(now, state)
    assert not moved(params, before)


@pytest.mark.filterwarnings("ignore:what is stepped in eigenbases")
@pytest.mark.parametrize("step", [-1.0, 1.5, float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("method", [fs.adamw, fs.shampoo, fs.soap])
def test_steps_that_no_run_has_made_are_refused(method: Any, step: float) -> None:
    params = parameters()
    saved = adamw_run(parameters(), 2).state_dict()
    saved["state"][1]["step"] = torch.tensor(step)
    optimizer = fs.Optimizer(params.items(), method, lr=0.1)
    match = "no step of 'p4', but has moments" if step == 0 else "steps of 'p4'"
    with pytest.raises(ValueError, match=match):
        optimizer.seed_from_adamw(saved)
    for x in (saved["state"][1]["exp_avg"], saved["state"][1]["exp_avg_sq"]):
        x.zero_()
    if step == 0:
        optimizer.seed_from_adamw(saved)  # it has not been moved yet


def test_a_method_without_moments_is_an_error() -> None:
    params = parameters()
    adamw = adamw_run(params, 2)
    optimizer = fs.Optimizer(params.items(), fs.sgd, lr=0.1)
    with pytest.raises(ValueError, match="no moments of these names to fill"):
        optimizer.seed_from_adamw(adamw.state_dict())


@pytest.mark.filterwarnings("ignore:what is stepped in eigenbases")
@pytest.mark.parametrize("method", [fs.adamw, fs.shampoo, fs.soap])
def test_seeding_after_steps_starts_from_nothing_else(method: Any) -> None:
    """By an error that says how, whatever the state is of; what is loaded replaces it."""
    params = parameters()
    saved = adamw_run(params, 3).state_dict()
    before = copies(params)
    ends = []
    for way in ("fresh", "seeded twice", "cleared", "loaded"):
        twins = {name: Parameter(p.clone()) for name, p in before.items()}
        optimizer = fs.Optimizer(twins.items(), method, accept_adamw=True, lr=0.05)
        if way != "fresh":
            run(optimizer, twins, grads_of(3, seed=50))
            with pytest.raises(ValueError, match="has moments already"):
                optimizer.seed_from_adamw(saved)
            for name, p in twins.items():
                p.data.copy_(before[name])
        if way == "loaded":
            optimizer.load_state_dict(saved)
            optimizer.param_groups[0]["lr"] = 0.05
        else:
            optimizer.state.clear()
            optimizer.seed_from_adamw(saved)
        if way == "seeded twice" and method is not fs.soap:
            with pytest.raises(ValueError, match="another seeding"):
                optimizer.seed_from_adamw(saved)
        run(optimizer, twins, grads_of(3, seed=60))
        ends.append(twins)
    for end in ends[1:]:
        assert_same(end, ends[0], 0.0)


@pytest.mark.parametrize("named", [False, True])
def test_for_model_whose_groups_have_another_order(named: bool) -> None:
    """Of equal shapes, which would be taken for one another."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.ReLU()
    )
    given = model.named_parameters() if named else model.parameters()
    adamw = torch.optim.AdamW(given, lr=0.1)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 1.0 + i)
    adamw.step()
    optimizer = fs.for_model(model, "adamw", lr=0.1)
    optimizer.seed_from_adamw(adamw.state_dict())
    for p in model.parameters():
        entries = optimizer.state[p]
        (second,) = [x for name, x in entries.items() if name.endswith("scale_by_adam/second")]
        assert torch.equal(second, adamw.state[p]["exp_avg_sq"])


@pytest.mark.parametrize("method", [fs.soap, fs.kl_soap, fs.eigenvalue_shampoo])
def test_what_is_stepped_in_eigenbases_starts_anew(method: Any) -> None:
    """AdamW's moments would be divided by those of the first gradient, in other coordinates."""
    params = parameters()
    adamw = adamw_run(params, 5)
    twins = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    seeded = fs.Optimizer(params.items(), method, lr=0.1)
    fresh = fs.Optimizer(twins.items(), method, lr=0.1)
    with pytest.warns(UserWarning, match="starts without AdamW's moments"):
        seeded.seed_from_adamw(adamw.state_dict())
    for optimizer, own in ((seeded, params), (fresh, twins)):
        run(optimizer, own, grads_of(4, seed=7))
    assert_same(params, twins, 0.0)


DAMAGED: dict[str, tuple[Any, str]] = {
    "negative rate": (lambda saved: saved["param_groups"][0].update(lr=-1.0), "lr is -1.0"),
    "no rate": (lambda saved: saved["param_groups"][0].update(lr=None), "lr is None"),
    "no pair": (lambda saved: saved["param_groups"][0].update(betas=0.9), "betas are 0.9"),
    "no list": (lambda saved: saved["param_groups"][0].update(params=None), "no state_dict"),
    "no number": (lambda saved: saved["state"][1].update(step=[1]), r"made \[1\] steps of"),
    "no one number": (
        lambda saved: saved["state"][1].update(step=torch.ones(2)),
        r"made tensor\(\[1., 1.\]\) steps of",
    ),
    "no moment": (lambda saved: saved["state"][1].update(exp_avg=[1]), r"exp_avg of .* is \[1\]"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adamw_is_told_before_anything_changes(damage: str) -> None:
    """Also what the group could not be stepped with afterwards, nor the optimizer saved."""
    params = parameters()
    saved = adamw_run(parameters(), 2).state_dict()
    damaged, message = DAMAGED[damage]
    damaged(saved)
    optimizer = fs.Optimizer(params.items(), fs.shampoo, accept_adamw=True, **OPTIONS)
    run(optimizer, params, grads_of(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before.keys()
    for i, entries in before.items():
        assert_same(after[i], entries)
    run(optimizer, params, grads_of(1))


def test_a_group_that_could_not_be_stepped_is_not_loaded() -> None:
    params = parameters()
    optimizer = fs.Optimizer(params.items(), fs.adamw, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["maximize"] = "no"
    with pytest.raises(TypeError, match="maximize is 'no'"):
        optimizer.load_state_dict(saved)
    run(optimizer, params, grads_of(1))
