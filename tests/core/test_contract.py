"""The contract: any update with two, three or more arguments; apply_updates."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch

import funshampoo as fs
from funshampoo.core.contract import as_transformation


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
    updates, _ = tx.update({"w": torch.ones(1)}, state, params, value=3.0, grad_fn=None)
    assert updates["w"].item() == expected
    by_name, _ = tx.update({"w": torch.ones(1)}, state, params=params, value=3.0)
    assert by_name["w"].item() == expected


def test_stateless_functions_get_what_they_declare() -> None:
    params = {"w": torch.tensor([4.0])}
    for function, expected in (
        (lambda updates: updates, 1.0),
        (lambda updates, params: params, 4.0),
        (lambda updates, *, value: {"w": updates["w"] * value}, 3.0),
        (lambda updates, **extra: {"w": updates["w"] * extra["value"]}, 3.0),
    ):
        updates, _ = fs.stateless(function).update({"w": torch.ones(1)}, (), params, value=3.0)
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
