"""What a newcomer hands over in the place of a tree or a state: refused, with what was meant."""

from __future__ import annotations

import inspect
import io
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg
from funshampoo.authoring import leafwise, stateless, wrapping
from funshampoo.core.live import Live
from funshampoo.state import Checkpoint, check, health, load_state_dict, state_dict, summary
from funshampoo.testing import check_stage
from tests.sooner import these
from tests.trees import assert_unchanged, snapshot

NO_STATES: dict[str, Callable[[torch.nn.Module], Any]] = {
    "a transformation": lambda model: fs.soap(0.1),
    "an optimizer": lambda model: fs.Shampoo(model.parameters()),
    "an optimizer's state": lambda model: fs.Shampoo(model.parameters()).state,
    "an optimizer's state_dict": lambda model: fs.Shampoo(model.parameters()).state_dict(),
    "a module": lambda model: model,
    "None": lambda model: None,
}
READERS: dict[str, Callable[[Any], Any]] = {
    "state_dict": state_dict,
    "load_state_dict": lambda state: load_state_dict(state, state_dict({})),
    "Checkpoint": lambda state: Checkpoint(state).state_dict(),
    "check": check,
    "summary": lambda state: summary(state, file=io.StringIO()),
    "health": lambda state: health(state, file=io.StringIO()),
    "evaluation_parameters": lambda state: fs.evaluation_parameters(state, {}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("given", NO_STATES)
def test_what_is_no_state(given: str, reader: str) -> None:
    """An optimizer was saved as an empty checkpoint, and reported to have nothing to report."""
    with pytest.raises(TypeError, match=r"optimizer\.chain_states\(\)"):
        READERS[reader](NO_STATES[given](torch.nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "tree", [lambda m: m, lambda m: m.parameters(), lambda m: [*m.named_parameters()]]
)
@pytest.mark.parametrize("recipe", [fs.shampoo, fs.muon, fs.adamw])
def test_a_module_for_its_parameters(recipe: Any, tree: Callable[[torch.nn.Module], Any]) -> None:
    with pytest.raises(TypeError, match=r"give dict\(module.named_parameters\(\)\)"):
        recipe(0.1).init(tree(torch.nn.Linear(3, 2)))


SWAPPED: dict[str, Callable[[Any, Any, Any], tuple[Any, ...]]] = {
    "state first": lambda g, s, p: (s, g, p),
    "parameters first": lambda g, s, p: (p, g, s),
    "of torch.autograd.grad": lambda g, s, p: (tuple(g.values()), s, p),
    "a module": lambda g, s, p: (torch.nn.Linear(3, 2), s, p),
}


@pytest.mark.parametrize("arguments", SWAPPED)
@pytest.mark.parametrize(
    "step", [lambda tx: tx.update, lambda tx: lambda *x: fs.update_in_place(tx, *x)]
)
@pytest.mark.parametrize("recipe", [fs.shampoo, fs.muon, fs.adamw])
def test_arguments_in_another_order_or_form(recipe: Any, step: Any, arguments: str) -> None:
    tx, params = recipe(0.1), {"w": torch.ones(3, 2), "b": torch.ones(2)}
    state, grads = tx.init(params), {"w": torch.ones(3, 2), "b": torch.ones(2)}
    before = snapshot(params, state)
    with pytest.raises(ValueError, match="no leaf in common: .* Give both as one kind of tree"):
        step(tx)(*SWAPPED[arguments](grads, state, params))
    assert_unchanged(before, params, state)


def clipped_by() -> fs.GradientTransformation:
    """With a tree of the caller's own, such as an estimate of the Hessian."""
    from funshampoo.authoring import stateless, update_leaves

    def clipped(updates: Any, *, hessian: Any) -> Any:
        return update_leaves(lambda u, h: ((u / h).clamp(-1, 1),), updates, (), (hessian,))[0]

    return stateless(clipped, "clipped_by")


AROUND: dict[str, Any] = {
    "blocked": lambda tx: fs.blocked(tx, max_size=2),
    "tiles": lambda tx: fs.blocked(tx, max_size=2, tile=4),
    "masked": lambda tx: fs.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: fs.partition({"w": tx, "b": fs.scale(1.0)}, {"w": "w", "b": "b"}),
    "blocked in partition": lambda tx: AROUND["partition"](AROUND["blocked"](tx)),
    "sharded": fs.sharded,
    "compiled": lambda tx: fs.compiled(AROUND["blocked in partition"](tx), backend="eager"),
}


@pytest.mark.parametrize("step", ["update", "in_place"])
@pytest.mark.parametrize("around", these(AROUND, sooner=AROUND.keys() - {"compiled"}))
def test_a_tree_of_the_callers_own_is_cut_as_the_updates_are(around: Any, step: str) -> None:
    """It was whole where the stage had parts, which was an error."""
    names = {"w": torch.randn(5, 3), "b": torch.randn(3)}
    g, h = names, {name: 3 * torch.rand_like(x) for name, x in names.items()}
    tx, whole = around(fs.chain(clipped_by(), fs.trace(0.9))), fs.chain(clipped_by(), fs.trace(0.9))
    mine, other = ({n: torch.zeros_like(x) for n, x in names.items()} for _ in range(2))
    state, expected = tx.init(mine), whole.init(other)
    for t in range(2):
        given = {"hessian": {n: x + t for n, x in h.items()}}
        out, expected = whole.update(g, expected, other, **given)
        other = fs.apply_updates(other, out)
        if step == "update":
            out, state = tx.update(g, state, mine, **given)
            mine = fs.apply_updates(mine, out)
        else:
            state = fs.update_in_place(tx, g, state, mine, **given)
    assert torch.equal(mine["w"], other["w"])


OTHER_TREES: dict[str, Any] = {
    "structure": {"w": torch.ones(3, 2)},
    "shape": {"w": torch.ones(3, 1), "b": torch.ones(2)},
    "numbers": {"w": 1.0, "b": 1.0},
}


@pytest.mark.parametrize("tree", OTHER_TREES.values(), ids=OTHER_TREES)
def test_a_tree_of_the_callers_own_that_is_unlike_the_updates(tree: Any) -> None:
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    tx = fs.blocked(clipped_by(), max_size=2)
    with pytest.raises(ValueError, match=r"reads a dict of .*'w' beside its .* of its shape\."):
        tx.update(params, tx.init(params), params, hessian=tree)


EXCEPT = {"dampening", "relative_epsilon"}  # nobody's without momentum; may be one a matrix
ONE_NUMBER = [
    (place, name)
    for place, known in (("transforms", fs.transforms.__all__), ("recipes", [*fs.recipes.RECIPES]))
    for name in known
    if callable(getattr(getattr(fs, place), name))
]


def required(make: Any) -> dict[str, Any]:
    """What it can't be built without."""
    known = inspect.signature(make).parameters
    needed: dict[str, Any] = {
        "inner": fs.scale(1.0),
        "learning_rate": 0.1,
        "average": 0.5,
        "interpolation": 0.5,
    }
    needed |= {
        "min_ratio": 0.1,
        "max_value": 1.0,
        "max_norm": 1.0,
        "factor": 1.0,
        "look_ahead": 0.1,
    }
    needed |= {"weight_decay": 0.1, "direction": fs.scale(1.0), "onto": fs.scale(1.0)}
    return {n: needed[n] for n, p in known.items() if p.default is p.empty and n in needed}


@pytest.mark.parametrize(("place", "name"), ONE_NUMBER)
def test_several_numbers_for_one(place: str, name: str) -> None:
    """They were a stage's error of shapes on the first step, or broadcast over the last side."""
    make = getattr(getattr(fs, place), name)
    known, given = inspect.signature(make).parameters, required(make)
    for argument, parameter in known.items():
        if parameter.annotation in ("Hyper", "Hyper | Schedule") and argument not in EXCEPT:
            with pytest.raises(TypeError, match=rf"{argument} has the shape \(2,\)"):
                make(**{**given, argument: torch.ones(2)})


# Limits, which an infinite number switches off.
LIMITS = {"max_value", "max_norm", "max_ratio", "spike_factor", "basis_tolerance", "max_residual"}
OF_NUMBERS = ("Hyper", "float", "Scale", "Exponents", "Least")
FINITE = [
    *ONE_NUMBER,
    *[("linalg", name) for name in linalg.__all__ if name.islower()],
    *[("schedules", name) for name in fs.schedules.__all__],
    *[("combinators.guard", "guarded")],
]


@pytest.mark.parametrize(("place", "name"), FINITE)
def test_numbers_are_finite(place: str, name: str) -> None:
    """An infinite decay, damping or momentum passed, and the first step made NaN of everything."""
    make = operator.attrgetter(f"{place}.{name}")(fs)
    known = inspect.signature(make).parameters
    given = required(make)
    if place == "schedules":
        numbers = {"value": 1.0, "start": 1.0, "end": 0.0, "peak": 1.0, "warmup_steps": 1}
        given = {n: x for n, x in ({"steps": 3} | numbers).items() if n in known}
    for argument, parameter in known.items():
        if any(word in str(parameter.annotation) for word in OF_NUMBERS):
            for value in (math.inf, -math.inf, math.nan):
                if argument in LIMITS and value == math.inf:
                    make(**{**given, argument: value})
                    continue
                with pytest.raises(ValueError, match=argument):
                    make(**{**given, argument: value})


def test_numbers_of_a_step_are_finite() -> None:
    tx = fs.chain(fs.trace(Live("momentum", 0.9)), fs.clip(Live("max_value", 1.0)))
    params = {"w": torch.ones(2)}
    state = tx.init(params)
    tx.update(params, state, hyper={"max_value": math.inf})
    with pytest.raises(ValueError, match=r"momentum is inf; it must lie in \[0.0, inf\)"):
        tx.update(params, state, hyper={"momentum": math.inf})


def live(rate):  # type: ignore[no-untyped-def]
    return fs.scale(rate)


live.takes_live = True  # type: ignore[attr-defined]

# What is handed over where a function of an author's is expected, and what the error shows of it.
FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "leafwise, nothing of blocks": (
        lambda: leafwise(lambda u: u),
        r"leaf is <lambda>\(u\); it is called with \(u, block_ndim\)",
    ),
    "leafwise, a parameter": (
        lambda: leafwise(lambda u, w, block_ndim: u),
        "needs_params=True adds the parameter w",
    ),
    "leafwise, no number": (
        lambda: leafwise(lambda u, block_ndim: u, [0.1]),
        r"called with \(u, number, block_ndim\)",
    ),
    "leafwise, by keyword": (lambda: leafwise(lambda u, *, block_ndim: u), "leaf is <lambda>"),
    "stateless": (lambda: stateless(lambda: 1, "mine"), r"called with \(updates\)"),
    "update": (
        lambda: fs.GradientTransformation(lambda params: (), lambda u: u),
        r"update is <lambda>\(u\); it is called with \(updates, state\)",
    ),
    "init": (
        lambda: fs.GradientTransformation(lambda params, beta: (), lambda u, s: (u, s)),
        r"init is <lambda>\(params, beta\); it is called with \(params\)",
    ),
    "wrapping": (
        lambda: wrapping(fs.ema(), lambda run, u: run(u)),
        r"called with \(run, updates, own\)",
    ),
    "context in the place of params": (
        lambda: fs.GradientTransformation(lambda params: (), lambda u, s, context: (u, s)),
        "the fourth parameter",
    ),
    "check_stage": (
        lambda: check_stage(lambda beta: fs.ema(beta)),
        r"write check_stage\(lambda: mine\(0.1\)\)",
    ),
    "inject_hyperparams": (
        lambda: fs.inject_hyperparams(fs.soap(0.1)),  # type: ignore[arg-type]
        "give the function that makes it",
    ),
    "inject_hyperparams, a number without a type": (
        lambda: fs.inject_hyperparams(live)(0.1),
        "declare rate: float",
    ),
    "chain": (lambda: fs.chain([fs.ema(), fs.sign()]), r"chain\(\*stages\)"),
}


@pytest.mark.parametrize("place", FUNCTIONS)
def test_functions_that_do_not_fit(place: str) -> None:
    """They failed on the first step, by Python's "missing 1 required positional argument"."""
    make, words = FUNCTIONS[place]
    with pytest.raises(TypeError, match=words):
        make()
