"""A state of a stage that was built with other options: it goes on, or the error says what differs.

What a stage keeps may depend on its options: Adam has no first moment if beta1 is 0.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.core.built_with import built_with
from funshampoo.state import load_state_dict, state_dict
from tests.table import CASES
from tests.test_bad_input import tree
from tests.trees import assert_unchanged, clone, snapshot, tensors

Makers = list[Callable[[], fs.GradientTransformation]]


def schedule(count: Tensor) -> float:
    return 0.1


def with_each(make: Callable[..., Any], *options: dict[str, Any], first: Any = ()) -> Makers:
    return [functools.partial(make, *first, **own) for own in ({}, *options)]


def rooted(graft: Any = None, **options: Any) -> fs.GradientTransformation:
    root = fs.root_inverse(**{"every": 2, "start": 1, **options})
    roots = root if graft is None else fs.graft(root, fs.scale_by_adam(graft))
    return fs.blocked(fs.chain(fs.kronecker_statistics(0.9), roots), max_size=4)


def based(beta1: float = 0.9, through: str = "", **options: Any) -> fs.GradientTransformation:
    basis = fs.in_eigenbasis(fs.scale_by_adam(beta1), 2, **options)
    kl: Any = {"through": through, "least_eigenvalue": 0.1}
    statistics = fs.kl_statistics(0.9, **kl) if through else fs.kronecker_statistics(0.9)
    return fs.blocked(fs.chain(statistics, basis), max_size=4)


def guarded(**options: Any) -> fs.GradientTransformation:
    return fs.guarded(fs.trace(0.9), **options)


AT_RATES = (fs.scale_by_learning_rate, fs.hyperball, fs.schedule_free, fs.ema_nesterov, fs.adamw)
OWN = {"own_steps": False}
OTHERS: dict[str, Makers] = {
    "trace": with_each(
        fs.trace, {"dampening": 0.5}, {"dampening": 0.5, "dampen_first_step": False}
    ),
    "ema": with_each(fs.ema, {"beta1": 0.0}, {"bias_correction": False}, OWN),
    "scale_by_adam": with_each(
        fs.scale_by_adam, {"beta1": 0.0}, {"nesterov": True}, {"weighted": False}, OWN
    ),
    "scale_by_second_moment": with_each(
        fs.scale_by_second_moment, {"beta2": 1.0}, {"bias_correction": False}, OWN
    ),
    "kronecker_statistics": with_each(
        fs.kronecker_statistics, {"every": 2}, {"packed": True}, {"sides": "smaller"}, OWN
    ),
    "root_inverse": with_each(
        rooted,
        {"basis_tolerance": 0.1},
        {"exponents": {1: 0.0, 2: 0.25}},
        {"graft": 0.0},
        {"graft": 0.9},
    ),
    "in_eigenbasis": with_each(
        based, {"beta1": 0.0}, {"first": "identity"}, {"stagger": True}, {"through": "eigenvalues"}
    ),
    "kl_statistics": with_each(
        lambda through="eigenvalues": based(through=through, first="identity"), {"through": "ritz"}
    ),
    "guarded": with_each(guarded, {"every": 2}, {"spike_factor": 2.0}, {"by_leaf": True}),
    "tail_average": with_each(fs.tail_average, {"start": 3}, {"beta": 0.9}),
    "normalize_rows": with_each(fs.normalize_rows, {"flatten_sides": False}),
    "multi_steps": with_each(fs.multi_steps, {"every": 2}, first=[fs.trace(0.9)])[1:],
    "sharded": [
        lambda: fs.adamw(0.1),
        lambda: fs.adamw(schedule),
        lambda: fs.adamw(0.1, distribute=fs.sharded),
        lambda: fs.adamw(schedule, distribute=fs.sharded),
    ],
    **{f.__name__: [functools.partial(f, rate) for rate in (0.1, schedule)] for f in AT_RATES},
    "shampoo": with_each(
        fs.shampoo,
        {"beta1": 0.0},
        {"grafting": None},
        {"statistics_every": 10},
        first=[0.1],
    ),
}


def refused(function: Callable[[], Any], message: str) -> bool:
    """Whether it raises ValueError, which then says this; nothing else may be raised."""
    said = []
    try:
        function()
    except ValueError as error:
        said = [str(error)]
    assert all([message in text for text in said])
    return bool(said)


def goes_on(make: Any, state: Any, params: Any) -> bool:
    """A step in place with a new transformation: it works as ever, or changes nothing."""
    before, found = snapshot(state, params), [state]

    def step() -> None:
        found[0] = fs.update_in_place(make(), tree(2), state, params)

    if refused(step, "the state is not "):
        assert_unchanged(before, state, params)
        return False
    assert all([x.isfinite().all() for x in tensors([*found, params])])
    wanted = make().init(params)
    if isinstance(state, dict) and "clock" not in wanted:
        found[0].pop("clock", None)  # which is left alone
    assert optree.tree_structure(found[0]) == optree.tree_structure(wanted)
    return True


@pytest.mark.parametrize("stage", OTHERS)
def test_a_state_of_other_options_goes_on_or_is_refused(stage: str) -> None:
    """A new transformation believed that it knew a state that one of the same names had made."""
    params = tree(0)
    for make, other in itertools.permutations(OTHERS[stage], 2):
        tx, loaded = make(), other().init(params)
        _, state = tx.update(tree(1), tx.init(params), params)
        saved = state_dict(clone(state))
        goes_on(other, state, clone(params))

        def load(other: Any = other, saved: Any = saved) -> Any:
            return load_state_dict(other().init(params), saved).state

        if not refused(load, "the checkpoint does not fit the state"):
            loaded = load()
        assert goes_on(other, loaded, clone(params))


FIELDS: dict[str, tuple[Any, Any, str]] = {
    "beta1": (fs.scale_by_adam, lambda: fs.scale_by_adam(0.0), "first"),
    "dampening": (fs.trace, OTHERS["trace"][2], "seen"),
    "sides": (fs.kronecker_statistics, OTHERS["kronecker_statistics"][3], "factors"),
    "own_steps": (fs.ema, lambda: fs.ema(own_steps=False), "weight"),
    "basis_tolerance": (rooted, OTHERS["root_inverse"][1], "value"),
    "spike_factor": (guarded, OTHERS["guarded"][2], "spikes"),
}


@pytest.mark.parametrize("option", FIELDS)
def test_the_error_names_the_field(option: str) -> None:
    """And no option: a parameter may have any name, also that of a field."""
    one, two, name = FIELDS[option]
    params = tree(0)
    for make, other in ((one, two), (two, one)):
        with pytest.raises(ValueError, match=f"at '.*{name}") as stepped:
            make().update(tree(1), other().init(params), params)
        with pytest.raises(ValueError, match=f"(missing|unknown).*{name}") as loaded:
            load_state_dict(make().init(params), state_dict(other().init(params)))
        assert all(["depends on" not in str(error.value) for error in (stepped, loaded)])


@pytest.mark.parametrize("rate", [0.1, schedule])
@pytest.mark.parametrize("guard", [False, True])
def test_sharded_around_a_whole_chain_comes_and_goes(rate: Any, guard: bool) -> None:
    """It counts in place of what is in it: the count goes where the chain has its own."""
    params = tree(0)
    chains = [fs.adamw(rate, guard=guard, distribute=way) for way in (None, fs.sharded)]
    for here, there in (chains, chains[::-1]):
        _, state = here.update(tree(1), here.init(params), params)
        saved, fresh = state_dict(state), there.init(params)
        if guard or rate is schedule or there is chains[0]:
            loaded = load_state_dict(fresh, saved).state
        else:  # nobody has counted
            with pytest.raises(ValueError, match=r"count begins at 0.\n.*strict=False"):
                load_state_dict(fresh, saved)
            loaded = load_state_dict(fresh, saved, strict=False).state
        wanted, _ = here.update(tree(2), state, params)
        found, after = there.update(tree(2), loaded, params)
        assert all(map(torch.equal, tensors(found), tensors(wanted)))
        counts = [int(x) for name, x in state_dict(after).items() if name.endswith("/steps")]
        assert counts == ([2] if guard or rate is schedule else [1] * (there is chains[1]))


class Config:
    """An object of a class that the library does not know."""

    def __init__(self, second: bool) -> None:
        self.second = second

    def __call__(self, params: Any) -> Any:
        return {"second" if self.second else "first": params}


class Kind(enum.Enum):
    ONE = "first"
    TWO = "second"


def with_init(init: Any) -> fs.GradientTransformation:
    return fs.GradientTransformation(init, lambda u, s: (u, s), "mine")


UNKNOWN: dict[str, tuple[Any, Any]] = {
    "object": (lambda c: lambda params: c(params), [Config(False), Config(True)]),
    "method": (lambda c: c.__call__, [Config(False), Config(True)]),
    "init": (lambda c: c, [Config(False), Config(True)]),
    "namespace": (
        lambda c: lambda params: {c.name: params},
        [types.SimpleNamespace(name=name) for name in ("first", "second")],
    ),
    "enum": (lambda c: lambda params: {c.value: params}, list(Kind)),
    "set": (lambda c: lambda params: dict.fromkeys(c, params), [{"first"}, {"second"}]),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_an_init_reads_of_any_object_tells_states_apart(kind: str) -> None:
    """Of an object of an unknown class only the class was compared."""
    make, (one, two) = UNKNOWN[kind]
    params = tree(0)
    state = with_init(make(one)).init(params)
    with_init(make(two)).init(params)  # whose states are known from now on
    with pytest.raises(ValueError, match="the state is not "):
        with_init(make(two)).update(tree(1), state, params)
    with_init(make(one)).update(tree(1), state, params)


@dataclasses.dataclass
class Unset:
    cache: Any = dataclasses.field(init=False)


class Unreadable(collections.abc.Mapping[str, Any]):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter(["key"])

    def __getitem__(self, key: str) -> Any:
        raise OSError("closed")


class Unhashable(str):
    __hash__ = None  # type: ignore[assignment]


STRANGE: dict[str, Any] = {
    "unset field": Unset(),
    "unreadable": Unreadable(),
    "any attribute": torch.ops,
    "mock": mock.MagicMock(),
    "unhashable": Unhashable("a"),
    "deep": functools.reduce(lambda inner, _: [inner], range(2000), []),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_init_may_close_over_anything(kind: str) -> None:
    """To compare it must never raise what `init` itself does not."""
    strange, params = STRANGE[kind], tree(0)
    for _ in range(2):
        tx = with_init(lambda params: params if strange is not None else ())
        tx.update(tree(1), tx.init(params), params)


def wrapped(rate: float) -> fs.GradientTransformation:
    inner = fs.adamw(rate)
    return fs.GradientTransformation(inner.init, lambda u, s, p: inner.update(u, s, p))


REBUILT: dict[str, Callable[[float], fs.GradientTransformation]] = {
    **{case.name: lambda _, make=case.make: make() for case in CASES},  # type: ignore[misc]
    "wrapped": wrapped,
    "pair": lambda rate: fs.chain((fs.trace(rate).init, lambda u, s: (u, s))),
    "spikes": lambda rate: guarded(spike_factor=2.0 + rate),
    "damping": lambda rate: fs.shampoo(0.1, relative_epsilon=rate),
}


def test_a_rebuilt_transformation_has_the_same_key() -> None:
    """Also with another number in its `update`: else `init` runs again on every rebuilt step."""
    differing = [name for name, f in REBUILT.items() if built_with(f(0.1)) != built_with(f(0.2))]
    assert differing == []
