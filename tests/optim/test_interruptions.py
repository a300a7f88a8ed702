"""Whatever ends a step or a load, and wherever: all of it, nothing of it, or the state says so."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.state.naming import named_tensors
from tests.optim.runs import (
    ADAMW,
    SGD,
    SHAMPOO,
    Method,
    assert_same,
    copies,
    grads_of,
    parameters,
    run,
)

KINDS = [RuntimeError, ValueError, MemoryError, KeyboardInterrupt, SystemExit]


def raising(kind: type[BaseException], at: int) -> fs.GradientTransformation:
    """Raises on its call number `at`; the stages after it have written to nothing then."""
    calls: list[int] = []

    def update(updates: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise kind("no more")
        return updates

    return fs.stateless(update, "raising")


def in_groups(tx: Any, count: int) -> tuple[fs.Optimizer, dict[str, Any]]:
    params = parameters()
    named = list(params.items())
    groups = [{"params": named[i::count]} for i in range(count)]
    return fs.Optimizer(groups, tx, lr=0.1), params


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("group", [0, 1, 2])
def test_an_exception_in_a_group(kind: type[BaseException], group: int) -> None:
    """Nothing has moved in the first; before the others a part of the parameters has."""
    tx = fs.chain(raising(kind, at=3 + group + 1), fs.scale_by_adam())
    optimizer, params = in_groups(tx, 3)
    run(optimizer, params, grads_of(1))
    with pytest.raises(kind):
        run(optimizer, params, grads_of(1))
    uses = [optimizer.step, optimizer.state_dict, optimizer.chain_states]
    uses += [lambda: copy.deepcopy(dict(optimizer.state))]
    uses += [lambda p=p: optimizer.state[p] for p in params.values()]
    for use in uses:
        if group:
            with pytest.raises(fs.InterruptedStepError, match="half done.*checkpoint.*state.clear"):
                use()
        else:
            use()


@pytest.mark.parametrize("loads", [True, False], ids=["checkpoint", "clear"])
def test_the_ways_back(loads: bool) -> None:
    """From a step that ended where the stages before the one that raised have written."""
    tx = fs.chain(fs.scale_by_adam(), raising(KeyboardInterrupt, at=6))
    optimizer, params = in_groups(tx, 2)
    grads = grads_of(5)
    run(optimizer, params, grads[:2])
    saved, before = copy.deepcopy(optimizer.state_dict()), copies(params)
    with pytest.raises(KeyboardInterrupt):
        run(optimizer, params, grads[2:3])
    for name, p in params.items():
        p.data.copy_(before[name])
    if loads:
        optimizer.load_state_dict(saved)
    else:
        optimizer.state.clear()
    run(optimizer, params, grads[2:])
    start = parameters() if loads else before
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
    other = fs.Optimizer(twins.items(), fs.scale_by_adam(), lr=0.1)
    run(other, twins, grads if loads else grads[2:])
    assert_same(params, twins)


def test_a_group_that_has_no_parameters_marks_nothing() -> None:
    """So that an error in the arguments, found in the second, can be corrected."""
    optimizer, params = in_groups(fs.chain(raising(ValueError, at=1), fs.scale_by_adam()), 2)
    for p in optimizer.param_groups[0]["params"]:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no more"):
        run(optimizer, params, grads_of(1))
    run(optimizer, params, grads_of(1))


def test_the_limit_of_failures_is_told_before_any_group_moves() -> None:
    tx = fs.guarded(fs.scale_by_adam(), max_failures=2, every=1)
    optimizer, params = in_groups(tx, 2)
    for p in params.values():
        p.grad = torch.ones_like(p)
    for p in optimizer.param_groups[1]["params"]:
        p.grad.fill_(torch.nan)
    optimizer.step()
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(fs.FailureLimitError):
        optimizer.step()
    assert same(before, snapshot(optimizer))
    optimizer.state_dict()


def snapshot(optimizer: fs.Optimizer) -> list[Any]:
    """Parameters, states and numbers of the groups, read past every check."""
    found: list[Any] = []
    for one in optimizer._memory.runs:
        found += [{n: x for n, x in one.group.items() if n != "params"}]
        found += [p.detach().clone() for p in one.group["params"]]
        found += [x.clone() for *_, x in named_tensors(one._state)]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b)
    )


WRAPPER = ("optimizer.py", "memory.py", "undoing.py")
IN_A_GROUP = [("group.py", "step"), ("group.py", "adopt"), ("group.py", "mark_interrupted")]


@contextmanager
def ctrl_c(at: int) -> Iterator[list[str]]:
    """Ctrl-C before the line number `at` that is run where groups are changed; all until it."""
    lines: list[str] = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        file = code.co_filename.rpartition("funshampoo/optim/")[2]
        if file not in WRAPPER and (file, code.co_name) not in IN_A_GROUP:
            return None
        if event == "line":
            lines.append(f"{file}:{frame.f_lineno}")
            if len(lines) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def _stepped(optimizer: fs.Optimizer) -> None:
    optimizer.step()


def _loaded(saved: Any) -> Callable[[fs.Optimizer], None]:
    return lambda optimizer: optimizer.load_state_dict(saved)


def _seeded(saved: Any) -> Callable[[fs.Optimizer], None]:
    return lambda optimizer: optimizer.seed_from_adamw(saved)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (ADAMW, "step"),
        (ADAMW, "load"),
        (ADAMW, "seed"),
        (ADAMW, "adopt"),
        (SGD, "load"),
        (SHAMPOO, "step"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_ctrl_c_before_every_line_of_the_wrapper(method: Method, what: str) -> None:
    params, grads = parameters(), grads_of(2)
    named = list(params.items())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = method.optimizer(groups, accept_adamw=True)
    run(optimizer, params, grads[:1])
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.01
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params.values()]
    old = torch.optim.AdamW([{"params": twins[:2]}, {"params": twins[2:]}])
    for p in twins:
        p.grad = torch.ones_like(p)
    old.step()
    run(optimizer, params, grads[1:])
    if what == "seed":  # which steps would not be made with
        optimizer.state.clear()
    acts = {"step": _stepped, "load": _loaded(saved), "seed": _seeded(old.state_dict())}
    acts["adopt"] = _loaded(old.state_dict())
    act = acts[what]

    def attempt(at: int) -> tuple[fs.Optimizer, list[Any], list[str]]:
        twin = copy.deepcopy(optimizer)
        for p, q in zip(_all(twin), _all(optimizer)):
            p.grad = q.grad
        twin.chain_states()
        before = snapshot(twin)
        with ctrl_c(at) as lines, suppress(KeyboardInterrupt):
            act(twin)
        return twin, before, lines

    done, _, lines = attempt(10**9)
    after = snapshot(done)
    assert len(lines) > 15
    for at in range(1, len(lines) + 1):
        twin, before, seen = attempt(at)
        now = snapshot(twin)
        if not same(now, before) and not same(now, after):
            assert _is_marked(twin), f"half done, and not marked, at {seen[-1]}"


def _is_marked(optimizer: fs.Optimizer) -> bool:
    try:
        optimizer.state_dict()
    except fs.InterruptedStepError:
        return True
    return False


def _all(optimizer: fs.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
