"""Parameter groups: one for every role, method and set of options."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from funshampoo.core.checks import hint
from funshampoo.core.contract import GradientTransformation
from funshampoo.models.kinds import ROLES, Kind
from funshampoo.optim.vocabulary import Vocabulary
from funshampoo.recipes import ELEMENTWISE, LOOK_AHEAD, OF_ADAMS_LENGTH, RECIPES

Recipe: TypeAlias = Callable[..., GradientTransformation]


class Routes(NamedTuple):
    """Which method, with which options, each role gets.

    Attributes:
        method, options: for the roles in `roles`.
        others, other_options: for all other roles.
    """

    method: Recipe
    options: Mapping[str, Any]
    others: Recipe
    other_options: Mapping[str, Any]
    roles: Collection[str]

    def settings(self, kind: Kind, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of the group that a parameter of this kind belongs to.

        Args:
            extra: the user's settings for this parameter.

        Raises:
            TypeError: a method chosen for it has no learning rate, or does not take an option.
        """
        main = kind.role in self.roles
        method, options = (self.method, self.options) if main else (self.others, self.other_options)
        if extra:
            chosen = recipe_of("the method in overrides", extra.get("method", method))
            if chosen is not method:
                known = {self.others: self.other_options, self.method: self.options}
                rate = {} if chosen in known or "lr" in extra else {"lr": default_rate(chosen)}
                options = known.get(chosen, rate)
            method = chosen
            own = {key: value for key, value in extra.items() if key != "method"}
            Vocabulary(method, own).defaults(own)  # raises for an option that it does not take
        found: dict[str, Any] = {"role": kind.role}
        if not main and kind.role == "vector" and "weight_decay" in _arguments(method):
            found["weight_decay"] = 0.0
        if _has_guard(method):
            found["guard"] = True
        found |= options
        if kind.stacked is not None and "merge" in _arguments(method):
            found["merge"] = kind.stacked
        return {**for_new_runs(method), **found, **extra, "method": method}


def recipe_of(argument: str, given: Any) -> Recipe:
    """A recipe by its name, or itself.

    Raises:
        ValueError: no recipe has this name.
        TypeError: neither a name nor a function.
    """
    if isinstance(given, str):
        if given not in RECIPES:
            near = hint(given, RECIPES)
            raise ValueError(f"{argument} is '{given}'{near} Known are {', '.join(RECIPES)}.")
        return RECIPES[given]
    if isinstance(given, GradientTransformation) or not callable(given):
        raise TypeError(
            f"{argument} is {given!r}; give the name of a recipe, or a function that makes a chain "
            "of a learning rate: groups have rates of their own."
        )
    return given  # type: ignore[no-any-return]


def for_new_runs(recipe: Recipe) -> dict[str, Any]:
    """Options that differ from a recipe's default, its paper's, because docs/defaults.md found them
    to be better, or as good, on every task, at no cost: for Shampoo exponents of 1/3 and Nesterov's
    look-ahead, for those of `LOOK_AHEAD` nesterov=True.
    """
    found: dict[str, Any] = {}
    if _of_partial(recipe) in [RECIPES[name] for name in LOOK_AHEAD]:
        found = {"nesterov": True}
    elif _of_partial(recipe) is RECIPES["shampoo"]:
        found = {"exponents": 1 / 3, "beta3": "nesterov"}
    return {n: value for n, value in found.items() if n not in getattr(recipe, "keywords", {})}


def _of_partial(recipe: Recipe) -> Any:
    return getattr(recipe, "func", recipe)


def default_rate(recipe: Recipe) -> Any:
    """A recipe's default learning rate."""
    rate = Vocabulary(recipe).defaults({}).get("lr")
    if rate is None:
        raise TypeError(
            f"{getattr(recipe, '__name__', 'the recipe')} has no learning rate of its own: give it "
            "as other_lr, or as 'lr' in overrides where the method stands."
        )
    return rate


def rate_of_others(
    rest: Recipe, given: Mapping[str, Any], main: Recipe, options: Mapping[str, Any]
) -> Any:
    """The rate of the other recipe where none is given: the method's, if their steps are as long.

    Args:
        given, options: the arguments of the other recipe, and of the method, lr among the latter.
    """
    alike = _is_of_adams_length(rest, given) and _is_of_adams_length(main, options)
    return options["lr"] if alike else default_rate(rest)


def _is_of_adams_length(recipe: Recipe, options: Mapping[str, Any]) -> bool:
    if _of_partial(recipe) not in [RECIPES[name] for name in OF_ADAMS_LENGTH]:
        return False
    bound = getattr(recipe, "keywords", {})
    return {**bound, **options}.get("grafting", "adam") in ("adam", "rms")


def _arguments(recipe: Recipe) -> Collection[str]:
    return inspect.signature(recipe).parameters.keys()


def _has_guard(recipe: Recipe) -> bool:
    """Whether it has a guard, which is off by default and which no partial sets."""
    guard = inspect.signature(recipe).parameters.get("guard")
    bound = getattr(recipe, "keywords", {})
    return guard is not None and guard.default is False and "guard" not in bound


def scaled(settings: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The settings with the rate multiplied by this factor, which is added to them."""
    if isinstance(settings["lr"], Tensor):
        raise TypeError("scale_rates makes new rates, so that lr has to be a number, no tensor.")
    return {**settings, "lr": settings["lr"] * factor, "rate_factor": factor}


def warn_of_routes(routes: Routes, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if no parameter gets the method, or if it can't tell the matrices of a stack apart.

    In the name of the caller's caller.
    """
    if all(s["method"] is not routes.method for s in settings.values()):
        warnings.warn(
            f"no parameter has one of the roles {', '.join(sorted(routes.roles))}: everything goes "
            "to the other method.",
            stacklevel=3,
        )
    elementwise = [RECIPES[name] for name in ELEMENTWISE]
    for name, own in settings.items():
        blind = own["method"] not in elementwise and "merge" not in own
        if own["role"] in ("experts", "heads") and blind:
            called = getattr(own["method"], "__name__", "the method")
            warnings.warn(
                f"{called} takes no `merge`, so that '{name}' is one tensor to it and not several "
                "matrices: have it hand merge on to its blocked(...).",
                stacklevel=3,
            )
            return


def grouped(
    parameters: Mapping[str, nn.Parameter], settings: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The parameter groups, one for equal settings, in the order of `ROLES`."""
    groups: list[dict[str, Any]] = []
    names = sorted(parameters, key=lambda name: ROLES.index(settings[name]["role"]))
    for name in names:
        for group in groups:
            if _equal(group, settings[name]):
                group["params"].append((name, parameters[name]))
                break
        else:
            groups.append({"params": [(name, parameters[name])], **settings[name]})
    return groups


def _equal(group: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a group has these settings; tensors are compared by identity."""
    if group.keys() - {"params"} != settings.keys():
        return False
    pairs = [(group[key], value) for key, value in settings.items()]
    return all(
        x is y or (not isinstance(x, Tensor) and type(x) is type(y) and x == y) for x, y in pairs
    )
