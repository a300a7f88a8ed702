"""What one rank alone edits between two steps is told on every rank, before anything moves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import funshampoo as fs
from funshampoo.distributed import disagreement
from funshampoo.distributed.disagreement import Bits, PreviousStep, announce_change
from funshampoo.state import state_dict
from tests.distributed.problems import SMALL, optimizer, tree
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

SHAPES = ((4, 6), (4, 6), (5, 7), (4, 6))


class Few(nn.Module):
    """Parameters of which three are alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
        self.more = nn.Parameter(torch.randn(3, 3))


def parameters(way: str) -> list[nn.Parameter]:
    model = Few()
    if way == "parts":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return [*model.all, model.more]


def give_gradients(params: list[nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        torch.manual_seed(10 * t + i)
        whole = torch.randn(p.shape, dtype=p.dtype)
        p.grad = whole if not isinstance(p, DTensor) else placed(whole, p)


def placed(whole: Tensor, like: DTensor) -> DTensor:
    return torch.distributed.tensor.distribute_tensor(whole, like.device_mesh, like.placements)


def as_double(opt: fs.Optimizer, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.double()
    params[0].grad = params[0].grad.double()  # type: ignore[union-attr]


def put(**entries: Any) -> Callable[[fs.Optimizer, list[nn.Parameter]], None]:
    return lambda opt, params: opt.param_groups[0].update(entries)


Edit = Callable[[fs.Optimizer, list[nn.Parameter]], Any]
# {what one rank does: (how, what is said of it)}
EDITS: dict[str, tuple[Edit, str]] = {
    "lr": (put(lr=0.5), "learning_rate is 0.03 on rank 0, 0.5 on rank 1"),
    "betas": (put(betas=(0.5, 0.99)), "beta1 is 0.9 on rank 0, 0.5 on rank 1"),
    "weight_decay": (put(weight_decay=0.2), "weight_decay is 0.1 on rank 0, 0.2 on rank 1"),
    "no weight_decay": (put(weight_decay=0.0), "weight_decay is 0.1 on rank 0, 0.0 on rank 1"),
    "every": (put(every=5), "group 0: every is 2 on rank 0, 5 on rank 1"),
    "momentum": (put(momentum=0.9), "group 0: momentum is 0.0 on rank 0, 0.9 on rank 1"),
    "maximize": (put(maximize=True), "group 0: maximize is False on rank 0, True on rank 1"),
    "reverse": (
        lambda opt, params: opt.param_groups[0]["params"].reverse(),
        "group 0: parameter 0 is 'param_0', (4, 6), torch.float32 on rank 0, 'param_3', (4, 6)",
    ),
    "swap of equal shapes": (
        lambda opt, params: put(params=[params[i] for i in (1, 0, 2, 3)])(opt, params),
        "group 0: parameter 0 is 'param_0', (4, 6), torch.float32 on rank 0, 'param_1', (4, 6)",
    ),
    "remove": (
        lambda opt, params: opt.param_groups[0]["params"].pop(),
        "group 0: the number of parameters is 4 on rank 0, 3 on rank 1",
    ),
    "add": (
        lambda opt, params: opt.param_groups[0]["params"].append(params[4]),
        "group 0: the number of parameters is 4 on rank 0, 5 on rank 1",
    ),
    "a group": (
        lambda opt, params: opt.add_param_group({"params": [params[4]]}),
        "the number of groups is 1 on rank 0, 2 on rank 1",
    ),
    "reset": (
        lambda opt, params: opt.state.pop(params[1]),
        "'param_1', (4, 6), torch.float32 on rank 0, 'param_1', (4, 6), torch.float32, that starts "
        "from nothing",
    ),
    "dtype": (as_double, "'param_0', (4, 6), torch.float32 on rank 0, 'param_0', (4, 6), torch.f"),
}
ORDINARY = {"lr", "betas", "weight_decay", "maximize"}  # which the status of a step tells


def shampoo(params: list[nn.Parameter], **options: Any) -> fs.Optimizer:
    given = {"lr": 0.03, "every": 2, "weight_decay": 0.1, "distribute": fs.sharded} | options
    return fs.Shampoo(params[:4], **given)


def begun(way: str, **options: Any) -> tuple[list[nn.Parameter], fs.Optimizer]:
    params = parameters(way)
    opt = shampoo(params, **options)
    for t in range(3):
        give_gradients(params, t)
        opt.step()
    give_gradients(params, 3)
    return params, opt


def local(params: list[nn.Parameter]) -> list[Tensor]:
    return [
        (p.to_local() if isinstance(p, DTensor) else p).detach().clone().float() for p in params
    ]


def problem_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return ""


def edited(rank: int, way: str, name: str, guilty: int, reads: bool) -> Any:
    """Rank 1 edits; then all step, but for the guilty one where it only reads its state."""
    params, opt = begun(way)
    before, since = local(params), time.monotonic()
    if rank == 1:
        EDITS[name][0](opt, params)
    act = opt.state_dict if reads and rank == guilty else opt.step
    found = problem_of(act)
    assert time.monotonic() - since < 10
    assert_equal(local(params), before)
    total = torch.tensor(1.0)
    dist.all_reduce(total)  # nobody is left in another collective
    return found, total.item()


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(("way", "size"), [("whole", 3), ("parts", 2)])
def test_an_edit_on_one_rank_is_told_on_all(ranks: Ranks, way: str, size: int, name: str) -> None:
    for message, total in ranks(size, edited, way, name, 1, False):
        assert EDITS[name][1] in message
        assert "do not agree" in message
        assert total == size


@pytest.mark.parametrize("name", ["remove", "momentum"])
def test_so_is_one_that_is_met_while_saving(ranks: Ranks, name: str) -> None:
    for message, _ in ranks(2, edited, "whole", name, 1, True):
        assert EDITS[name][1] in message


def unlike(rank: int) -> str:
    """Everybody edits, each in a way of its own, with other collectives to come."""
    _, opt = begun("whole")
    opt.param_groups[0].update({"every": 5} if rank else {"momentum": 0.9})
    return problem_of(opt.step)


def test_unlike_edits_on_all_ranks(ranks: Ranks) -> None:
    for message in ranks(2, unlike):
        assert "group 0: momentum is 0.9 on rank 0, 0.0 on rank 1" in message or (
            "group 0: every is 2 on rank 0, 5 on rank 1" in message
        )


def alike(rank: int, name: str) -> Any:
    """(parameters after a common edit and three steps, the gathers that one of them took)."""
    shared = dist.is_initialized() and dist.get_world_size() > 1
    params, opt = begun("whole", **({} if shared else {"distribute": None}))
    EDITS[name][0](opt, params)
    gathers = 0
    original = fs.distributed.all_gather.all_gather_into

    def counted(*arguments: Any) -> None:
        nonlocal gathers
        gathers += 1
        original(*arguments)

    for t in (3, 4, 5):
        give_gradients(params, t)
        if t == 5:
            fs.distributed.all_gather.all_gather_into = counted
        opt.step()
    fs.distributed.all_gather.all_gather_into = original
    return local(params), gathers


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_on_all_ranks_goes_on_as_on_one(ranks: Ranks, name: str) -> None:
    alone, _ = alike(0, name)
    groups = 2 if name == "a group" else 1
    for found, gathers in ranks(2, alike, name):
        assert_equal(found, alone)
        assert gathers == groups  # a step in which nobody edits is one collective


def functional(rank: int) -> Any:
    """Without the wrapper: one rank is given fewer parameters."""
    tx, params = optimizer({}), tree(0, SMALL)
    state, fewer = tx.init(params), {n: x for n, x in params.items() if n != "bias"}
    for t in (1, 2):
        _, state = tx.update(tree(t, SMALL), state, params)
    given = fewer if rank == 2 else params
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    state = tx.init(given) if rank == 2 else state
    return problem_of(lambda: tx.update(tree(3, shapes), state, given))


def test_other_parameters_of_a_function_are_told_too(ranks: Ranks) -> None:
    for message in ranks(3, functional):
        assert "the number of parameters is 4 on rank 0, 3 on rank 2" in message


def frozen(rank: int) -> Any:
    """A group without parameters to step, and a rank that reads alone."""
    params = parameters("whole")
    opt = fs.Shampoo([{"params": params[:4]}, {"params": []}], lr=0.1, distribute=fs.sharded)
    params[4].requires_grad_(False)
    opt.param_groups[1]["params"].append(params[4])
    for t in range(3):
        give_gradients(params[:4], t)
        opt.step()
        if rank == 0 and t:
            opt.chain_states()
    return local(params)


def test_a_group_of_frozen_parameters_is_no_edit(ranks: Ranks) -> None:
    first, second = ranks(2, frozen)
    assert_equal(first, second)


def options(rank: int, name: str) -> str:
    params = parameters("whole")
    opt = shampoo(params, **{name: rank == 1})
    give_gradients(params, 0)
    return problem_of(opt.step)


@pytest.mark.parametrize("name", ["consolidate", "accept_adamw"])
def test_options_of_the_wrapper_are_compared(ranks: Ranks, name: str) -> None:
    for message in ranks(2, options, name):
        assert f"{name} is False on rank 0, True on rank 1" in message


def ascending(rank: int) -> str:
    params = parameters("whole")
    opt = fs.Shampoo(
        [{"params": params[:4], "maximize": rank == 1}], lr=0.1, every=2, distribute=fs.sharded
    )
    give_gradients(params, 0)
    return problem_of(opt.step)


def test_who_ascends_from_the_start(ranks: Ranks) -> None:
    for message in ranks(2, ascending):
        assert "group 0: maximize is False on rank 0, True on rank 1" in message


def copied(rank: int) -> Any:
    """A copy that all make goes on, though it has met nobody."""
    params, opt = begun("whole")
    both = copy.deepcopy((params, opt))
    found = []
    for p, one in ((params, opt), both):
        give_gradients(p, 3)
        one.step()
        found.append([local(p), state_dict(one.chain_states()[0])])
    return found


def test_a_copy_on_all_ranks(ranks: Ranks) -> None:
    for first, second in ranks(2, copied):
        assert_equal(first, second)


class Scripted:
    """What the others' statuses are, step after step."""

    def __init__(self, *rows: list[list[float]]) -> None:
        self.rows, self.met_with = list(rows), []  # type: ignore[var-annotated]

    def repeat(self, word: float) -> Tensor:
        self.met_with.append(word)
        return torch.tensor(self.rows.pop(0))


def status(word: float, number: int) -> list[float]:
    return [word, 0, 0, 0, 0, 0, number, 0]


def test_on_a_device_it_goes_on_until_the_others_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """They look on multiples of 4, of two chains in turn, and come for the words then alone."""
    first = Scripted([status(3, 0), status(0, 3)], [status(3, 0), status(0, 4)])
    second = Scripted([status(3, 0), status(0, 3)])
    asked = []

    def gathered(mine: Any, group: Any) -> Any:
        asked.append((len(first.rows), len(second.rows)))
        return [mine, ([("every", "2")], Bits([], []), [])]

    monkeypatch.setattr(disagreement, "gathered_objects", gathered)
    steps = [PreviousStep(first.repeat, 4), PreviousStep(second.repeat, 4)]
    with pytest.raises(RuntimeError, match="every is 5 on rank 0, 2 on rank 1"):
        announce_change(steps, lambda: [("every", "5")], None)
    assert asked == [(0, 0)]
    assert first.met_with == [3.0, 3.0]


def test_a_rank_that_fails_meanwhile_is_told_first() -> None:
    others = Scripted([status(3, 0), status(2, 5), status(0, 5)])
    with pytest.raises(RuntimeError, match="was interrupted on rank 1 of 3"):
        announce_change([PreviousStep(others.repeat, 1)], list, None)
