"""An optimizer for a model: matrices to the method, the rest to AdamW.

A parameter group for every role, method and set of options.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from funshampoo.core.checks import check_choice, hint
from funshampoo.core.contract import GradientTransformation
from funshampoo.models.kinds import ROLES, Heads, Kind, Role
from funshampoo.models.roles import Overrides, extra_settings, kinds, settings_of
from funshampoo.models.table import warn_of_costs
from funshampoo.models.transfer import Base, rate_factors_of
from funshampoo.optim import Optimizer
from funshampoo.optim.vocabulary import Vocabulary
from funshampoo.recipes import ELEMENTWISE, RECIPES

Recipe: TypeAlias = Callable[..., GradientTransformation]

METHOD_ROLES: tuple[Role, ...] = ("matrix", "convolution", "experts", "heads")
"""What goes to the method, unless somebody says otherwise."""


def for_model(
    model: nn.Module,
    method: str | Recipe = "shampoo",
    *,
    lr: float | Tensor,
    other_lr: float | Tensor | None = None,
    others: str | Recipe = "adamw",
    other_options: Mapping[str, Any] | None = None,
    method_roles: Sequence[Role] = METHOD_ROLES,
    overrides: Overrides | None = None,
    heads: Heads = "fused",
    scale_rates: Literal["mup"] | None = None,
    base: Base | None = None,
    compile: bool | Mapping[str, Any] = False,
    cuda_graph: bool = False,
    tf32: bool = False,
    consolidate: bool = False,
    accept_adamw: bool = False,
    **options: Any,
) -> Optimizer:
    """A torch.optim.Optimizer for a whole model: its matrices get the method, the rest AdamW.

    There is a parameter group for every role, or more where settings differ, and `group["role"]`
    says which; state goes by the model's names. `print(funshampoo.routing_table(optimizer))` shows
    what became of every parameter. Stacked experts, and query, key and value in one weight, are
    taken apart by `blocks.Stacked`, for every method to which a matrix is more than its entries.

    Args:
        model: its parameters, each once, tied ones too. Frozen ones are there, and wait.
        method: a name of `funshampoo.recipes.RECIPES`, or a recipe: a function of the learning
            rate, and of `merge` if it is to know one matrix of a stack from another.
        lr: of the method.
        other_lr: of everything else; None: the default of `others`, 1e-3 for AdamW. A rate of a
            method says nothing about that of another: give the one that AdamW has had.
        others, other_options: a name or a recipe, and its arguments, such as betas. Where these do
            not say otherwise, vectors do not decay, and "adamw" holds a parameter whose gradient is
            not finite (guard=True).
        method_roles: the roles that the method gets.
        overrides: {pattern: role, or settings}: see `roles`. Settings that are no part of a role
            go into the parameters' group: its own lr, weight_decay, max_size, or method.
        heads: see `roles`.
        scale_rates, base: "mup": lr and other_lr are those that were good for `base`, a narrower
            model of the same names, or {name: shape} of it, and each parameter's is that times a
            factor by its fans, kept in `group["rate_factor"]`; see docs/transfer.md.
        compile, cuda_graph, tf32, consolidate, accept_adamw: see `Optimizer`.
        options: of the method, by torch.optim's names: betas, weight_decay, every, ... They don't
            reach `others`: AdamW's weight_decay stays 0.01 if other_options does not say so.

    Returns:
        The `Optimizer`. A scheduler multiplies all groups' rates; of one that sets them, give a
        list, one a group.

    Warns where a choice is dear: a large embedding or head with a method of matrices, a parameter
    whose state is many times AdamW's; and where no parameter is the method's, or the method can't
    tell the matrices of a stack apart.

    Raises:
        TypeError: the model is no module; an option that the method does not know; lr is missing.
        ValueError: an unknown method (says the nearest), role or pattern; a model without
            parameters, or of which all are frozen; scale_rates without base, or for a method that
            has no rule; a parameter that base lacks.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = for_model(model, "soap", lr=3e-3, weight_decay=0.1)
    >>> [(g["role"], g["param_names"], g["lr"]) for g in optimizer.param_groups]
    [('matrix', ['0.weight'], 0.003), ('head', ['2.weight'], 0.001), \
('vector', ['0.bias', '2.bias'], 0.001)]
    """
    main, rest = recipe_of("method", method), recipe_of("others", others)
    if isinstance(method_roles, str) or not isinstance(method_roles, Collection):
        raise TypeError(f"method_roles is {method_roles!r}; give a list of roles.")
    for role in method_roles:
        check_choice("method_roles", role, ROLES)
    check_choice("scale_rates", scale_rates, (None, "mup"))
    if (scale_rates is None) is not (base is None):
        raise ValueError("scale_rates='mup' and base go together: base is the model tuned before.")
    _check_model(model)
    found = kinds(model, overrides, heads)
    parameters = dict(model.named_parameters())
    extra = {n: extra_settings(s) for n, s in settings_of(found, overrides).items()}
    Vocabulary(main, options).defaults({"lr": lr, **options})  # raises for one it does not take
    plain = _of_others(rest, other_lr, other_options)
    routes = Routes(main, {"lr": lr, **options}, rest, plain, frozenset(method_roles))
    settings = {n: routes.settings(kind, extra[n]) for n, kind in found.items()}
    if base is not None:
        factors = rate_factors_of(parameters, found, base, settings)
        settings = {n: scaled(s, factors[n]) for n, s in settings.items()}
    warn_of_routes(routes, settings, stacklevel=2)
    flags: Any = {"compile": compile, "consolidate": consolidate, "accept_adamw": accept_adamw}
    flags |= {"cuda_graph": cuda_graph, "tf32": tf32}
    optimizer = Optimizer(grouped(parameters, settings), main, lr=lr, **flags, **options)
    optimizer._model_order = [name for name in parameters if name in settings]
    warn_of_costs(optimizer, stacklevel=2)
    return optimizer


def _of_others(rest: Recipe, rate: Any, options: Any) -> dict[str, Any]:
    """The arguments of the other recipe, by torch.optim's names."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"other_options is {options!r}; give a dict of arguments.")
    own = dict(options or {})
    if rate is not None and "lr" in own:
        raise TypeError("other_lr and the 'lr' of other_options are one number: give one of them.")
    plain = {"lr": default_rate(rest) if rate is None and "lr" not in own else rate, **own}
    if "guard" in inspect.signature(rest).parameters:
        plain.setdefault("guard", True)
    Vocabulary(rest, plain).defaults(plain)  # raises for one that it does not take
    return plain


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; give the module. Of tensors, "
            "partition(recipes, funshampoo.roles(params)) makes a chain."
        )
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("model has no parameters.")
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            "all parameters of model are frozen: unfreeze those that are to be trained, by "
            "requires_grad_(True), before the optimizer is made."
        )


class Routes(NamedTuple):
    """Who gets what.

    Attributes:
        method, options: of the roles in `roles`.
        others, other_options: of all other roles.
    """

    method: Recipe
    options: Mapping[str, Any]
    others: Recipe
    other_options: Mapping[str, Any]
    roles: Collection[str]

    def settings(self, kind: Kind, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of the group that a parameter of this kind belongs to.

        Args:
            extra: what the user says of this parameter.

        Raises:
            TypeError: a method of its own has no learning rate, or does not take an option.
        """
        main = kind.role in self.roles
        method, options = (self.method, self.options) if main else (self.others, self.other_options)
        if extra:
            chosen = recipe_of("the method in overrides", extra.get("method", method))
            if chosen is not method:
                known = {self.others: self.other_options, self.method: self.options}
                options = known.get(chosen) or (
                    {} if "lr" in extra else {"lr": default_rate(chosen)}
                )
            method = chosen
            own = {key: value for key, value in extra.items() if key != "method"}
            Vocabulary(method, own).defaults(own)  # raises for one that it does not take
        found: dict[str, Any] = {"role": kind.role}
        if not main and kind.role == "vector" and "weight_decay" in _arguments(method):
            found["weight_decay"] = 0.0
        found |= options
        if kind.stacked is not None and "merge" in _arguments(method):
            found["merge"] = kind.stacked
        return {**found, **extra, "method": method}


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


def default_rate(recipe: Recipe) -> Any:
    """The rate that a recipe has by itself."""
    rate = Vocabulary(recipe).defaults({}).get("lr")
    if rate is None:
        raise TypeError(
            f"{getattr(recipe, '__name__', 'the recipe')} has no learning rate of its own: give it "
            "as other_lr, or as 'lr' in overrides where the method stands."
        )
    return rate


def _arguments(recipe: Recipe) -> Collection[str]:
    return inspect.signature(recipe).parameters.keys()


def scaled(settings: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """With another rate, and the factor by which it differs."""
    if isinstance(settings["lr"], Tensor):
        raise TypeError("scale_rates makes new rates, so that lr has to be a number, no tensor.")
    return {**settings, "lr": settings["lr"] * factor, "rate_factor": factor}


def warn_of_routes(
    routes: Routes, settings: Mapping[str, Mapping[str, Any]], stacklevel: int
) -> None:
    """Warn where the method has nothing to do, and where it can't tell matrices apart."""
    if all(s["method"] is not routes.method for s in settings.values()):
        warnings.warn(
            f"no parameter has one of the roles {', '.join(sorted(routes.roles))}: everything goes "
            "to the other method.",
            stacklevel=stacklevel + 1,
        )
    elementwise = [RECIPES[name] for name in ELEMENTWISE]
    for name, own in settings.items():
        blind = own["method"] not in elementwise and "merge" not in own
        if own["role"] in ("experts", "heads") and blind:
            called = getattr(own["method"], "__name__", "the method")
            warnings.warn(
                f"{called} takes no `merge`, so that '{name}' is one tensor to it and not several "
                "matrices: have it hand merge on to its blocked(...).",
                stacklevel=stacklevel + 1,
            )
            return


def grouped(
    parameters: Mapping[str, nn.Parameter], settings: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Parameters of equal settings are a group; roles keep their order."""
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
    """Whether they say the same; tensors by identity."""
    if group.keys() - {"params"} != settings.keys():
        return False
    pairs = [(group[key], value) for key, value in settings.items()]
    return all(
        x is y or (not isinstance(x, Tensor) and type(x) is type(y) and x == y) for x, y in pairs
    )
