"""Whoever edits groups and parameters meets torch.optim's behaviour: state follows the tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import funshampoo as fs
from tests.sooner import these

Opt = torch.optim.Optimizer
Edit = Callable[[Opt, list[Parameter]], list[Parameter]]

SHAPES = [(3, 4), (3, 4), (4,), (3, 4)]  # three alike, which could be taken for one another
SCALES = [1.0, 1e2, 1e4, 1e6]  # so that the averages of one are of no use to another
HYPER: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.0}


def parameter(shape: tuple[int, ...], seed: int) -> Parameter:
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def step(optimizer: Opt, params: Iterable[Parameter], t: int) -> None:
    """One step, with gradients whose scale is the parameter's own."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * t + i)
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = g * p.scale  # type: ignore[attr-defined]
    optimizer.step()


def scaled(p: Parameter, scale: float) -> Parameter:
    p.scale = scale  # type: ignore[attr-defined]
    return p


def new(shape: tuple[int, ...]) -> Parameter:
    return scaled(parameter(shape, 77), 1e-3)


def remove(i: int) -> Edit:
    def edit(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not params[i]]
        return params[:i] + params[i + 1 :]

    return edit


def insert(i: int, shape: tuple[int, ...]) -> Edit:
    def edit(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
        q = new(shape)
        optimizer.param_groups[0]["params"].insert(i, q)
        return [*params, q]

    return edit


def replace(i: int, shape: tuple[int, ...]) -> Edit:
    def edit(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
        q = new(shape)
        group = optimizer.param_groups[0]
        group["params"] = [q if p is params[i] else p for p in group["params"]]
        return [q if p is params[i] else p for p in params]

    return edit


def reverse(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    optimizer.param_groups[0]["params"].reverse()
    return params


def move(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop(1))
    return params


def append_group(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    q = new((3, 4))
    rest = {k: v for k, v in optimizer.param_groups[0].items() if k != "param_names"}
    optimizer.param_groups.append({**rest, "params": [q]})
    return [*params, q]


def pop_group(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    gone = optimizer.param_groups.pop(0)["params"]
    return [p for p in params if all(p is not q for q in gone)]


def reverse_groups(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    optimizer.param_groups.reverse()
    return params


def other_dicts(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    optimizer.param_groups = groups[::-1]
    return params


def cleared(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    rest = {k: v for k, v in optimizer.param_groups[0].items() if k != "param_names"}
    optimizer.param_groups.clear()
    optimizer.param_groups.append({**rest, "params": list(reversed(params))})
    return params


def pruned(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    """As programs do that cut tensors: the state is taken out, cut, and put under the new one."""
    group, old = optimizer.param_groups[0], params[0]
    kept = optimizer.state.get(old, None)
    q = scaled(Parameter(old.detach()[1:].clone()), 1.0)
    if isinstance(optimizer, fs.Optimizer):
        cut = {n: x[1:] if x.shape[:1] == old.shape[:1] else x for n, x in kept.items()}
    else:
        cut = {n: x[1:] if x.ndim else x for n, x in kept.items()}
    del optimizer.state[old]
    group["params"][0] = q
    optimizer.state[q] = cut
    return [q, *params[1:]]


EDITS: dict[str, Edit] = {
    "remove_first": remove(0),
    "remove_second": remove(1),
    "insert_first": insert(0, (3, 4)),
    "insert_second": insert(1, (4,)),
    "append": insert(9, (3, 4)),
    "replace": replace(1, (3, 4)),
    "replace_by_another_shape": replace(1, (5, 2)),
    "reverse": reverse,
    "move": move,
    "append_group": append_group,
    "pop_group": pop_group,
    "reverse_groups": reverse_groups,
    "other_dicts": other_dicts,
    "cleared": cleared,
}


def trained(make: Callable[[Any], Opt], edit: Edit, named: bool) -> list[Tensor]:
    """Parameters at the end of a training with an edit, undone again by the tensors' owner."""
    params = [scaled(parameter(s, i), c) for i, (s, c) in enumerate(zip(SHAPES, SCALES))]
    given = [(f"layer{i}", p) for i, p in enumerate(params)] if named else params
    optimizer = make([{"params": given[:3]}, {"params": given[3:]}])
    for t in range(4):
        step(optimizer, params, t)
    now = edit(optimizer, params)
    for t in range(4, 7):
        step(optimizer, now, t)
    # What left comes back: it goes on from where it was.
    have = [p for group in optimizer.param_groups for p in group["params"]]
    back = [p for p in params if all(p is not q for q in have)]
    optimizer.param_groups[-1]["params"].extend(back)
    now = [*now, *back]
    for t in range(7, 10):
        step(optimizer, now, t)
    return [p.detach() for p in now]


def torchs(groups: Any) -> Opt:
    return torch.optim.AdamW(groups, **HYPER)


def adamw(groups: Any) -> Opt:
    return fs.Optimizer(groups, fs.adamw, **HYPER)


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("edit", [*EDITS, "pruned"])
def test_adamw_moves_as_torchs(edit: str, named: bool) -> None:
    change = {**EDITS, "pruned": pruned}[edit]
    ours, theirs = trained(adamw, change, named), trained(torchs, change, named)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x, y, rtol=0, atol=1e-12)


class Alone(torch.optim.Optimizer):
    """Every tensor has an optimizer of its own, as long as it lives: what state should follow."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})
        self.own: dict[Tensor, fs.Optimizer] = {}

    def step(self, closure: Any = None) -> Any:
        for p in [p for group in self.param_groups for p in group["params"]]:
            self.own.setdefault(p, shampoo([p])).step()


def shampoo(groups: Any) -> fs.Optimizer:
    return fs.Shampoo(groups, lr=0.01, every=1, max_size=2, momentum=0.9)


QUICK = {"insert_first", "replace_by_another_shape", "move", "pop_group", "cleared"}


@pytest.mark.parametrize(
    "named", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["unnamed", "named"]
)
@pytest.mark.parametrize("edit", these([*EDITS], sooner=QUICK))
def test_shampoo_moves_as_one_for_every_tensor(edit: str, named: bool) -> None:
    ours = trained(shampoo, EDITS[edit], named)
    alone = trained(Alone, EDITS[edit], named)
    for x, y in zip(ours, alone):
        assert torch.allclose(x, y, rtol=0, atol=1e-10)


def test_the_edits_matter() -> None:
    """An edit that changed nothing, or a state that did not matter, would test nothing."""
    still = trained(adamw, lambda _, params: params, named=False)
    for name, edit in EDITS.items():
        ended = trained(adamw, edit, named=False)
        if name not in {"reverse", "move", "reverse_groups", "other_dicts", "cleared"}:
            shapes = [x.shape for x in ended] == [x.shape for x in still]
            assert not shapes or not all(map(torch.equal, ended, still)), name
    forgetful = trained(adamw, _forget, named=False)
    assert not torch.allclose(forgetful[0], still[0], rtol=0, atol=1e-6)


def _forget(optimizer: Opt, params: list[Parameter]) -> list[Parameter]:
    optimizer.state.clear()
    return params


def test_names_follow_their_tensors() -> None:
    params = [scaled(parameter(s, i), 1.0) for i, s in enumerate(SHAPES)]
    optimizer = adamw([(f"layer{i}", p) for i, p in enumerate(params)])
    step(optimizer, params, 0)
    group = optimizer.param_groups[0]
    group["params"] = [params[2], new((3, 4)), params[0]]
    optimizer.step()
    assert group["param_names"] == ["layer2", "param_1", "layer0"]
    before = copy.deepcopy(dict(optimizer.state[params[0]]))
    group["param_names"] = ["a", "b", "c"]  # renamed, in another order of their own
    for p in group["params"]:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(x, optimizer.state[params[0]][name]) for name, x in before.items())
    group["param_names"] = ["a", "b"]
    with pytest.raises(ValueError, match="3 parameters and 2 param_names: give one"):
        optimizer.step()
    group["param_names"] = ["a", "b", "b"]
    with pytest.raises(ValueError, match="two parameters of the group are named 'b'"):
        optimizer.step()


@pytest.mark.parametrize("make", [adamw, shampoo])
def test_a_parameter_in_two_groups_is_an_error(make: Callable[[Any], Opt]) -> None:
    params = [scaled(parameter(s, i), 1.0) for i, s in enumerate(SHAPES)]
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}])
    step(optimizer, params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["params"].append(params[0])
    with pytest.raises(ValueError, match="is in the groups 0 and 1: take"):
        step(optimizer, params, 1)
    assert all(map(torch.equal, params, before))


def test_a_pickle_keeps_what_left() -> None:
    params = [scaled(parameter(s, i), 1.0) for i, s in enumerate(SHAPES)]
    optimizer = adamw(params)
    for t in range(3):
        step(optimizer, params, t)
    gone = optimizer.param_groups[0]["params"].pop(0)
    step(optimizer, params, 3)
    model = {"optimizer": optimizer, "gone": gone, "params": params}
    other = copy.deepcopy(model)
    for one in (model, other):
        one["optimizer"].param_groups[0]["params"].append(one["gone"])
        for p, q in zip(params, one["params"]):
            q.scale = p.scale
        step(one["optimizer"], one["params"], 4)
    assert all(map(torch.equal, params, other["params"]))


@pytest.mark.parametrize("make", [adamw, shampoo])
def test_a_parameter_may_move_to_a_younger_group(make: Callable[[Any], Opt]) -> None:
    """What was counted of it, such as a gradient that was not finite, is more than its clock."""
    params = [scaled(parameter(s, i), 1.0) for i, s in enumerate(SHAPES)]
    optimizer = make(params[:3])
    for t in range(4):
        step(optimizer, params[:3], t)
        if t == 1 and make is shampoo:
            params[0].grad = torch.full_like(params[0], torch.nan)
            optimizer.step()
    optimizer.add_param_group({"params": params[3:]})
    step(optimizer, params, 4)
    move(optimizer, params)
    first = optimizer.param_groups[0]["params"].pop(0)
    optimizer.param_groups[1]["params"].append(first)
    before = [p.detach().clone() for p in params]
    for t in range(5, 8):
        step(optimizer, params, t)
    assert all(not torch.equal(p, old) for p, old in zip(params, before))
    optimizer.load_state_dict(optimizer.state_dict())
