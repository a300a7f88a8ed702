"""The contract: any update with two, three or more arguments; apply_updates."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch

import funshampoo as fs
from funshampoo.authoring import stateless, wrapping
from funshampoo.core.context import Context
from funshampoo.core.contract import as_transformation
from tests.trees import assert_unchanged, snapshot, tensors


class OptaxStyle(NamedTuple):
    init: Any
    update: Any


def two(updates: Any, state: Any) -> Any:
    return {k: 2 * u for k, u in updates.items()}, state


def three(updates: Any, state: Any, params: Any = None) -> Any:
    return {k: u + params[k] for k, u in updates.items()}, state


def with_extra(updates: Any, state: Any, params: Any = None, *, value: float) -> Any:
    return {k: u * value for k, u in updates.items()}, state


def with_any(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    return {k: u * extra["value"] for k, u in updates.items()}, state


def no_params_but_extra(updates: Any, state: Any, **extra: Any) -> Any:
    return {k: u * extra["value"] for k, u in updates.items()}, state


def keyword_params(updates: Any, state: Any, *, params: Any) -> Any:
    return {k: u + params[k] for k, u in updates.items()}, state


def other_name(updates: Any, state: Any, weights: Any) -> Any:
    return {k: u + weights[k] for k, u in updates.items()}, state


def positional(*args: Any) -> Any:
    assert len(args) == 3
    return args[:2]


UNNAMED = lambda updates, state: (updates, state)  # noqa: E731


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (two, 2.0),
        (three, 5.0),
        (with_extra, 3.0),
        (with_any, 3.0),
        (no_params_but_extra, 3.0),
        (keyword_params, 5.0),
        (other_name, 5.0),
        (positional, 1.0),
        (functools.partial(with_extra), 3.0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("wrap", [fs.GradientTransformation, OptaxStyle, lambda i, u: (i, u)])
def test_an_update_gets_the_arguments_that_it_declares(
    update: Any, expected: float, wrap: Any
) -> None:
    stage = wrap(lambda params: fs.EmptyState(), update)
    tx = fs.chain(("mine", stage), fs.scale(1.0))
    params = {"w": torch.tensor([4.0])}
    state = tx.init(params)
    own = {"value": 3.0} if expected == 3.0 else {}
    updates, _ = tx.update({"w": torch.ones(1)}, state, params, **own)
    assert updates["w"].item() == expected
    by_name, _ = tx.update({"w": torch.ones(1)}, state, params=params, **own)
    assert by_name["w"].item() == expected


NESTED = {
    "alone": lambda tx: tx,
    "chain": lambda tx: fs.chain(fs.trace(0.9), tx),
    "blocked": fs.blocked,
    "guarded": lambda tx: fs.chain(fs.guarded(tx)),
    "masked": lambda tx: fs.masked(tx, True),
    "partition": lambda tx: fs.partition({"a": tx}, "a"),
    "multi_steps": lambda tx: fs.multi_steps(tx, 1),
    "sharded": fs.sharded,
    "graft": lambda tx: fs.graft(tx, fs.scale_by_sgd()),
}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("step", ["update", "in_place"])
def test_a_name_that_nobody_knows_is_an_error(nest: Any, step: str) -> None:
    """A typo, and what once told a guard that it need not look."""
    params = {"w": torch.ones(2)}
    tx = nest(fs.GradientTransformation(lambda params: (), with_extra))
    state = tx.init(params)

    def run(**context: Any) -> Any:
        if step == "update":
            return tx.update(params, state, params, **context)
        return fs.update_in_place(tx, params, tx.init(params), {"w": torch.ones(2)}, **context)

    run(value=2.0)
    for name, meant in (
        ("refesh", "did you mean 'refresh'"),
        ("vlaue", "did you mean 'value'"),
        ("finite", "no stage here knows 'finite'"),
        ("stops", "no stage here knows 'stops'"),
        ("usable", "no stage here knows 'usable'"),
    ):
        with pytest.raises(TypeError, match=meant):
            run(value=2.0, **{name: True})


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("step", ["update", "in_place", "wrapper"])
def test_a_name_that_a_stage_needs_is_missed_before_anything_changes(nest: Any, step: str) -> None:
    """Python's own error comes from inside the step, when a donated state is half done."""
    tx = nest(fs.chain(fs.trace(0.9), fs.GradientTransformation(lambda params: (), with_extra)))
    params, g = {"w": torch.nn.Parameter(torch.ones(2))}, {"w": torch.ones(2)}
    state = tx.init(params)
    before = [x.clone() for x in tensors(state)]
    params["w"].grad = torch.ones(2)
    run = {
        "update": lambda: tx.update(g, state, params),
        "in_place": torch.no_grad()(lambda: fs.update_in_place(tx, g, state, params)),
        "wrapper": fs.Optimizer(params.values(), tx, lr=1.0).step,
    }[step]
    message = r"needs 'value': pass value=\.\.\. to update or to Optimizer\.step, or give"
    with pytest.raises(TypeError, match=message):
        run()
    assert torch.equal(params["w"], torch.ones(2))
    assert all(map(torch.equal, tensors(state), before))
    with torch.no_grad():
        fs.update_in_place(tx, g, state, params, value=2.0)  # the state is whole


@pytest.mark.parametrize("name", ["donate", "refresh"])
def test_a_switch_of_the_context_is_a_bool(name: str) -> None:
    params = {"w": torch.ones(2, 2)}
    tx = fs.shampoo(0.1)
    with pytest.raises(TypeError, match=f"{name} is 'no'; expected True or False"):
        tx.update(params, tx.init(params), params, **{name: "no"})


def test_where_any_keyword_is_taken_a_typo_is_an_error_all_the_same() -> None:
    tx = fs.chain(fs.GradientTransformation(lambda params: (), with_any), fs.scale(1.0))
    params = {"w": torch.ones(1)}
    tx.update(params, tx.init(params), value=1.0, whatever=2)
    with pytest.raises(TypeError, match="did you mean 'refresh'"):
        tx.update(params, tx.init(params), value=1.0, refesh=True)


MISSPELT: dict[str, tuple[Any, str]] = {
    "update": (lambda u, s, *, refesh=None: (u, s), "'refesh'; did you mean 'refresh'.*accepts="),
    "by place": (lambda u, s, p=None, aliv=None: (u, s), "'aliv'; did you mean 'alive'"),
    "required": (lambda u, s, *, gradients: (u, s), "'gradients'; did you mean 'gradient'"),
    "all others": (lambda u, s, *, previos=(): (u, s), "'previos'; did you mean 'previous'"),
}


@pytest.mark.parametrize("way", ["stage", "pair", "stateless"])
@pytest.mark.parametrize("update", MISSPELT)
def test_a_misspelt_keyword_is_refused_when_a_stage_is_built(update: str, way: str) -> None:
    """With a default it would never be missed: `alive` of a typo is None for ever."""
    function, message = MISSPELT[update]
    build: dict[str, Any] = {
        "stage": lambda: fs.GradientTransformation(lambda params: (), function),
        "pair": lambda: fs.chain((lambda params: (), function)),
        "stateless": lambda: fs.stateless(function),
    }
    with pytest.raises(TypeError, match=message):
        build[way]()


def test_a_misspelt_keyword_of_other_functions_is_refused() -> None:
    with pytest.raises(TypeError, match="update is .*'aliv'; did you mean 'alive'.*another name.$"):
        fs.wrapping(fs.scale(1.0), lambda run, updates, own, *, aliv=None: (run(updates), own))
    with pytest.raises(TypeError, match="init is .*'upsteam'; did you mean 'upstream'"):
        fs.GradientTransformation(lambda params, upsteam=(): params, two)
    with pytest.raises(TypeError, match="flops is .*'appart'; did you mean 'apart'"):
        fs.GradientTransformation(lambda p: (), two, flops=lambda block, kept, appart=False: 0.0)


def test_other_words_are_no_misspellings() -> None:
    """Nor are names that are given by place, or by a partial."""

    def update(u: Any, s: Any, *, steps: Any = 1, block: Any = 1, layer: Any = 1) -> Any:
        return u, s

    def near(u: Any, s: Any, *, refesh: Any) -> Any:
        return u, s

    def init(upsteam: Any) -> Any:
        return ()

    def cloc(clocks: Any) -> Any:
        return ()

    def row(u: Any, s: Any, *, row: Any = 1, live: Any = 1, stream: Any = 1) -> Any:
        return u, s

    for function in (update, row, functools.partial(near, refesh=True)):
        fs.GradientTransformation(lambda params: (), function)
    for function in (init, cloc):
        fs.GradientTransformation(function, two)
    fs.GradientTransformation(lambda p: (), two, flops=lambda appart, kept: 0.0)


def test_a_value_of_the_callers_may_have_a_similar_name() -> None:
    def update(updates: Any, state: Any, *, layer: float = 1.0, loss: float = 1.0) -> Any:
        return {k: u * layer * loss for k, u in updates.items()}, state

    tx = fs.GradientTransformation(lambda params: (), update, accepts=["layer"])
    found, _ = tx.update({"w": torch.ones(1)}, (), layer=2.0, loss=3.0)
    assert found["w"].item() == 6.0


def test_a_stage_has_to_return_a_pair() -> None:
    def bare(updates: Any, state: Any) -> Any:
        return updates

    params = {"w": torch.ones(2)}
    for tx in (
        fs.chain(("mine", fs.GradientTransformation(lambda p: (), bare))),
        fs.chain(("mine", fs.GradientTransformation(lambda p: (), bare)), fs.scale(1.0)),
    ):
        with pytest.raises(TypeError, match=r"stage 'mine' returned a dict.*pair"):
            tx.update(params, tx.init(params))


def test_a_python_number_in_a_state_is_refused() -> None:
    stage = fs.GradientTransformation(lambda params: {"count": 0}, two, "counts")
    with pytest.raises(TypeError, match=r"state of 'counts' holds 0, a int.*torch.tensor"):
        fs.chain(fs.trace(0.9), stage).init({"w": torch.ones(1)})


def test_stateless_functions_get_what_they_declare() -> None:
    params = {"w": torch.tensor([4.0])}
    for function, expected in (
        (lambda updates: updates, 1.0),
        (lambda updates, params: params, 4.0),
        (lambda updates, *, value: {"w": updates["w"] * value}, 3.0),
        (lambda updates, **extra: {"w": updates["w"] * extra["value"]}, 3.0),
    ):
        own = {"value": 3.0} if expected == 3.0 else {}
        updates, _ = fs.stateless(function).update({"w": torch.ones(1)}, (), params, **own)
        assert updates["w"].item() == expected


def test_the_name_of_a_stage_is_its_functions() -> None:
    def momentum_of_mine() -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            return updates, state

        return fs.GradientTransformation(lambda params: (), update)

    assert momentum_of_mine().name == "momentum_of_mine"
    assert fs.trace(0.9).name == "trace"
    assert fs.GradientTransformation(lambda p: (), two).name == "two"
    assert fs.GradientTransformation(lambda p: (), UNNAMED).name == "stage"
    init, update = fs.trace(0.9)
    assert callable(init)
    assert callable(update)


@pytest.mark.parametrize("thing", [fs.trace, 3, (1, 2), None])
def test_what_is_not_a_transformation(thing: Any) -> None:
    with pytest.raises(TypeError, match="not a gradient transformation"):
        as_transformation(thing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apply_updates_rounds_once(dtype: torch.dtype) -> None:
    """W + U in float32, then to nearest: not U rounded first."""
    w = torch.tensor([1.0, 256.0, -3.0], dtype=dtype)
    u = torch.tensor([0.00390624, 1.0001, 1e-5])
    new = fs.apply_updates({"w": w}, {"w": u})["w"]
    assert new.dtype == dtype
    assert torch.equal(new, (w.double() + u.double()).to(dtype))
    if dtype == torch.bfloat16:
        assert not torch.equal(new, w + u.to(dtype))


def test_apply_updates_keeps_parameters_without_an_update() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    new = fs.apply_updates(params, {"a": None, "b": torch.ones(2)})
    assert new["a"] is params["a"]
    assert new["b"].tolist() == [2.0, 2.0]
    assert params["b"].tolist() == [1.0, 1.0]


def test_refresh_due() -> None:
    def days(**options: Any) -> list[int]:
        return [t for t in range(1, 21) if fs.refresh_due(t, **options)]

    assert days(every=5) == [1, 5, 10, 15, 20]
    assert days(every=5, start=5) == [5, 10, 15, 20]
    assert days(every=5, start=7) == [7, 10, 15, 20]  # the rule of the reference
    assert days(every=1, start=18) == [18, 19, 20]


def test_a_stage_that_takes_everything_may_be_called_without_parameters() -> None:
    def update(updates: Any, state: Any, params: Any, **context: Any) -> Any:
        return {"w": updates["w"] * (1 if params is None else 2)}, state

    tx = fs.GradientTransformation(lambda params: (), update)
    g = {"w": torch.ones(2)}
    assert tx.update(g, ())[0]["w"].tolist() == [1.0, 1.0]
    assert tx.update(g, (), g)[0]["w"].tolist() == [2.0, 2.0]


def test_a_stage_may_ask_for_the_old_states_of_all_others() -> None:
    """By `previous`, or by `earlier` and `later`, which it is made of; its own is none of them."""
    seen: list[Any] = []

    def update(updates: Any, state: Any, *, previous: Any, later: Any) -> tuple[Any, Any]:
        seen.append((previous, later))
        return updates, state

    def whole(updates: Any, state: Any, params: Any, context: Context) -> tuple[Any, Any]:
        seen.append((context.previous, context.later))
        return updates, state

    g = {"w": torch.ones(2)}
    for own in (update, whole):
        stage = fs.GradientTransformation(lambda params: (), own)
        tx = fs.chain(fs.trace(0.9), stage, fs.chain(fs.scale_by_sgd(), fs.ema(0.5)))
        state = tx.init(g)
        tx.update(g, state)
        before, _, after = state.values()
        assert seen.pop() == ((before, after), (after,))


class _Scaled:
    def __call__(self, updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        return {name: 2 * u for name, u in updates.items()}, state


def _scaled(updates: Any, state: Any, *, factor: float = 3.0) -> Any:
    return {name: factor * u for name, u in updates.items()}, state


@functools.wraps(_scaled)
def _wrapped(*args: Any, **kwargs: Any) -> Any:
    return _scaled(*args, **kwargs)


def _any_keyword(*args: Any, **context: Any) -> Any:
    return args[0], args[1]


@pytest.mark.parametrize(
    "update",
    [
        functools.partial(_scaled, factor=2.0),
        functools.partial(_any_keyword, note=1),
        _wrapped,
        _Scaled(),
    ],
)
def test_further_arguments_are_not_wanted_of_the_caller(update: Any) -> None:
    """`*args` and `**context` have no default, and were missed by name."""
    tx = fs.chain(fs.GradientTransformation(lambda params: fs.EmptyState(), update))
    params = {"w": torch.ones(2)}
    assert tx.update(params, tx.init(params), params)[0]["w"].shape == (2,)


def test_a_combinator_by_hand_may_pass_what_its_part_wants() -> None:
    inner = fs.stateless(lambda updates, *, factor: {"w": factor * updates["w"]})

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return inner.update(updates, state, params, factor=7.0)

    tx = fs.GradientTransformation(inner.init, update, parts={"inner": inner})
    params = {"w": torch.ones(2)}
    assert tx.update(params, tx.init(params), params)[0]["w"].tolist() == [7.0, 7.0]
    with pytest.raises(TypeError, match="needs 'factor'"):
        fs.chain(inner).update(params, fs.chain(inner).init(params), params)


def test_a_loss_is_no_tree_of_a_bare_number() -> None:
    """Beside one, it has its structure and shape, and was cut into a dict of stacks."""
    seen: list[Any] = []

    def update(updates: Any, state: Any, *, loss: Any = None) -> Any:
        seen.append(loss)
        return updates, state

    tx = fs.blocked(fs.GradientTransformation(lambda params: fs.EmptyState(), update))
    bare, loss = torch.tensor(1.0), torch.tensor(2.0)
    tx.update(bare, tx.init(bare), bare, loss=loss)
    assert seen[-1] is loss


def pulled(run: Any, updates: Any, own: Any, params: Any) -> Any:
    return keyword_params(run(updates), own, params=params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fs.GradientTransformation(lambda params: fs.EmptyState(), keyword_params, "mine"),
        lambda: fs.GradientTransformation(lambda params: fs.EmptyState(), other_name, "mine"),
        lambda: stateless(lambda u, params: keyword_params(u, (), params=params)[0], "mine"),
        lambda: wrapping(fs.scale(1.0), pulled, name="mine"),
    ],
)
def test_params_without_a_default_are_needed_before_a_step_begins(make: Any) -> None:
    params = {"w": torch.ones(3)}
    for around in (fs.chain, fs.guarded, fs.sharded):
        tx = fs.chain(fs.trace(0.9), around(make()))
        state = tx.init(params)
        before = snapshot(state)
        with pytest.raises(ValueError, match="mine needs the parameters: pass params to update"):
            tx.update(params, state, donate=True)
        assert_unchanged(before, state)
    inside = fs.blocked(make())
    with pytest.raises(ValueError, match="mine needs the parameters: blocked.*with_params=True"):
        inside.update(params, inside.init(params), params)
