"""Live numbers: hyperparameters that are looked up on every step.

A recipe that is called with a `Live` in place of a number builds its chain only once; the number's
value comes with every step, as `hyper` in the context. So an edit rebuilds nothing. Stages read
their numbers by `number`, which accepts ordinary ones too.

What a number switches on or off (momentum = 0: no stage) is decided when the chain is built, by its
value then: `is_exactly`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from funshampoo.core.tree import flatten

Numbers: TypeAlias = Mapping[str, Any]  # {name: number or tensor}
NO_NUMBERS: Numbers = {}


class Live:
    """A live hyperparameter: a named number that is looked up on every step.

    Args:
        name: of the entry in `Context.hyper`.
        initial: its value when the chain is built; a tensor switches nothing on or off.
        function: applied to the value before use.

    Attributes:
        checks: functions that raise if the entry's value is out of range for a stage.
    """

    def __init__(
        self, name: str, initial: Any, function: Callable[[Any], Any] | None = None
    ) -> None:
        self.name, self.initial, self.function = name, initial, function
        self.checks: list[Callable[[Any], None]] = []

    def note(self, check: Callable[[Any], None]) -> None:
        """Add a check of the value used: it raises if that is out of range."""
        function = self.function
        self.checks.append(check if function is None else lambda value: check(function(value)))

    def of(self, hyper: Numbers) -> Any:
        """The current value."""
        value = hyper.get(self.name, self.initial)
        return value if self.function is None else self.function(value)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A schedule that is a function of others, or of live numbers.

    Args:
        function: of the old step count and of the numbers' values on this step.
        numbers: each a number, a live number or a schedule.
    """

    function: Callable[..., Any]
    numbers: tuple[Any, ...]

    def __call__(self, count: Tensor, hyper: Numbers = NO_NUMBERS) -> Any:
        """The value at an old step count, with these live numbers."""
        return self.function(count, *[value_at(x, count, hyper) for x in self.numbers])


def value_at(value: Any, count: Any, hyper: Numbers) -> Any:
    """The value of a number, live number or schedule on this step.

    Args:
        count: the old step count; only a schedule needs it.
    """
    if isinstance(value, Derived):
        return value(count, hyper)
    return value(count) if callable(value) else number(value, hyper)


def number(value: Any, hyper: Numbers) -> Any:
    """A hyperparameter's value on this step: a number or a tensor.

    >>> number(0.5, {}), number(Live("lr", 0.1), {"lr": 0.2}), number(Live("lr", 0.1), {})
    (0.5, 0.2, 0.1)
    """
    return value.of(hyper) if isinstance(value, Live) else value


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A function of another hyperparameter; checks noted on the result apply to the original."""
    if not isinstance(value, Live):
        return function(value)
    before = value.function
    found = Live(
        value.name, value.initial, function if before is None else lambda x: function(before(x))
    )
    found.checks = value.checks
    return found


def resolved(holder: Any, hyper: Numbers) -> Any:
    """A dataclass, such as a solver, with the values of its live numbers on this step."""
    if not dataclasses.is_dataclass(holder) or isinstance(holder, type):
        return holder
    fields = {f.name: getattr(holder, f.name) for f in dataclasses.fields(holder)}
    live = {name: x.of(hyper) for name, x in fields.items() if isinstance(x, Live)}
    return dataclasses.replace(holder, **live) if live else holder


def numbers_among(values: Iterable[Any]) -> list[Any]:
    """These hyperparameters, with what a schedule or a dataclass of them, as a solver, is made of.

    >>> numbers_among([0.5, Derived(max, (0.1, 0.2))])
    [0.5, 0.1, 0.2]
    """
    found: list[Any] = []
    for value in values:
        if isinstance(value, Derived):
            found += numbers_among(value.numbers)
        elif dataclasses.is_dataclass(value):
            found += [getattr(value, field.name) for field in dataclasses.fields(value)]
        else:
            found.append(value)
    return found


def check_values(hyper: Numbers, lives: Iterable[Live]) -> None:
    """Check the caller's values against every stage that reads them; tensors pass unread.

    Raises:
        ValueError, TypeError: name the stage's argument, and the range.
    """
    for live in lives:
        value = hyper.get(live.name)
        if value is not None and not isinstance(value, Tensor):
            for check in live.checks:
                check(value)


def check_placed(hyper: Numbers, params: Any) -> None:
    """Check that no number is on the meta device while parameters are not.

    Raises:
        ValueError: one is on the meta device.
    """
    for name, value in hyper.items():
        if isinstance(value, Tensor) and value.is_meta:
            leaves = flatten(params)[0]
            if not all([isinstance(p, Tensor) and p.is_meta for p in leaves]):
                raise ValueError(
                    f"{name} is a tensor on the meta device, where it has no value; give a number, "
                    "or a tensor on the parameters' device or on the CPU."
                )


def is_exactly(value: Any, what: float) -> bool:
    """Whether a hyperparameter equals this number when the chain is built; a tensor never does.

    >>> is_exactly(0, 0.0), is_exactly(Live("momentum", 0.0), 0.0)
    (True, True)
    """
    value = initial(value)
    return isinstance(value, (int, float)) and value == what


def initial(value: Any) -> Any:
    """A hyperparameter's value when the chain is built."""
    return number(value, NO_NUMBERS)


def takes_live(recipe: Any) -> bool:
    """Whether a function may be called with a `Live` in place of a number.

    funshampoo's own may, and a user's that declares it by an attribute `takes_live`.
    """
    while isinstance(recipe, functools.partial):
        recipe = recipe.func
    return is_ours(recipe) or bool(getattr(recipe, "takes_live", False))


def signature_of(recipe: Any) -> inspect.Signature:
    """The arguments of a recipe.

    Those of `from_published` depend on the method, which a partial has fixed: a function's
    attribute `signature_for` tells which remain.
    """
    signature_for = getattr(getattr(recipe, "func", None), "signature_for", None)
    return inspect.signature(recipe) if signature_for is None else signature_for(recipe)


def is_live_argument(recipe: Any, parameter: inspect.Parameter) -> bool:
    """Whether an argument of such a function is a number that may be live: its type is `Hyper`.

    In a user's function, also `float`.
    """
    while isinstance(recipe, functools.partial):
        recipe = recipe.func
    words = ("Hyper",) if is_ours(recipe) else ("Hyper", "float")
    return any(word in str(parameter.annotation) for word in words)


def is_ours(recipe: Any) -> bool:
    """Whether a function is one of funshampoo's."""
    return str(getattr(recipe, "__module__", "")).split(".")[0] == __name__.split(".")[0]
