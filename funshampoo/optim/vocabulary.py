"""What a recipe calls its hyperparameters, and what torch.optim does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funshampoo.base import GradientTransformation, as_transformation
from funshampoo.combine import chain
from funshampoo.transforms import scale_by_learning_rate

Method = Any  # a recipe, or a transformation
_RENAMED = {"learning_rate": "lr"}
_OURS = {"params", "param_names", "method", "maximize"}


class Vocabulary:
    """What a method calls its hyperparameters, and what torch.optim does.

    >>> from funshampoo import adamw
    >>> Vocabulary(adamw).defaults({"lr": 0.1})["betas"]
    (0.9, 0.999)
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.fixed = not callable(method)
        if self.fixed:
            as_transformation(method)  # raises, where it is none
            self._arguments: dict[str, Any] = {}
            return
        parameters = inspect.signature(method).parameters.values()
        self._arguments = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        self._open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._paired = {"beta1", "beta2"} <= self._arguments.keys()

    def names(self) -> dict[str, Any]:
        """{torch's name: default, or inspect.Parameter.empty}."""
        if self.fixed:
            return {}
        named = {_RENAMED.get(name, name): value for name, value in self._arguments.items()}
        if self._paired:
            named["betas"] = (named.pop("beta1"), named.pop("beta2"))
        return named

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters: those given, the method's defaults for the rest.

        Raises:
            TypeError: one is unknown or missing.
        """
        self._check_known(given)
        if self.fixed:
            return dict(given)
        found = {**self.names(), **given}
        return {name: v for name, v in found.items() if v is not inspect.Parameter.empty}

    def check_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The method's defaults, for a group with a method of its own; the group's names checked.

        Raises:
            TypeError: a name that torch.optim or the recipe uses, but not this wrapper.
        """
        confusing = {
            *self._arguments,
            "eps",
            "learning_rate",
            "beta1",
            "beta2",
        } - self.names().keys()
        self._check_known({name: None for name in group if name in confusing})
        return {n: v for n, v in self.names().items() if v is not inspect.Parameter.empty}

    def arguments(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arguments from a group.

        Raises:
            TypeError: one is missing, or lr is a function.
        """
        if callable(group.get("lr")):
            raise TypeError(
                "lr is a function; the wrapper takes numbers. Use a scheduler of "
                "torch.optim.lr_scheduler, or the schedule in a functional loop."
            )
        if self.fixed:
            return {name: group[name] for name in ("lr",) if name in group}
        values = {name: group[name] for name in self.names() if name in group}
        if self._paired and "betas" in values:
            values["beta1"], values["beta2"] = values.pop("betas")
        arguments = {
            name: values[_RENAMED.get(name, name)]
            for name in self._arguments
            if _RENAMED.get(name, name) in values
        }
        for name, default in self._arguments.items():
            if default is inspect.Parameter.empty and name not in arguments:
                raise TypeError(f"{_RENAMED.get(name, name)} is missing: give it, or a default.")
        return arguments

    def build(self, arguments: Mapping[str, Any]) -> GradientTransformation:
        """The transformation with these arguments."""
        if not self.fixed:
            return as_transformation(self.method(**arguments))
        given = as_transformation(self.method)
        return chain(given, scale_by_learning_rate(arguments["lr"])) if arguments else given

    def _check_known(self, given: Mapping[str, Any]) -> None:
        known = {"lr"} if self.fixed else self.names().keys()
        unknown = sorted(set(given) - known - _OURS)
        if unknown and not (not self.fixed and self._open):
            what = "a transformation" if self.fixed else f"{self.method.__name__}"
            raise TypeError(
                f"{what} has no hyperparameter '{unknown[0]}'; it has {', '.join(sorted(known))}."
            )


def same_arguments(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two calls of a recipe give the same chain. Tensors are compared by identity."""

    def same(x: Any, y: Any) -> bool:
        if x is y:
            return True
        return type(x) is type(y) and not isinstance(x, Tensor) and bool(x == y)

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def structural(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's arguments can change the structure of the state: not a number's value.

    But whether it is 0 or 1 can, since these switch parts off.
    """

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "a tensor"
        if isinstance(value, float) and value not in (0.0, 1.0):
            return "a number"
        return value

    return {name: kind(value) for name, value in arguments.items()}


def without_objects(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a group that torch.load(weights_only=True) can read."""
    return {name: value for name, value in group.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(v) for key, v in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str) or type(value) is Tensor
