"""An optimizer for a model: the method for matrices, AdamW for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from funshampoo.core.checks import check_choice
from funshampoo.models.groups import (
    Recipe,
    Routes,
    for_new_runs,
    grouped,
    rate_of_others,
    recipe_of,
    scaled,
    warn_of_routes,
)
from funshampoo.models.kinds import ROLES, Heads, Role
from funshampoo.models.roles import Overrides, extra_settings, kinds, settings_of
from funshampoo.models.table import warn_of_costs
from funshampoo.models.transfer import Base, rate_factors_of
from funshampoo.optim import Optimizer
from funshampoo.optim.vocabulary import Vocabulary

METHOD_ROLES: tuple[Role, ...] = ("matrix", "convolution", "experts", "heads")
"""The roles that get the method by default."""


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
    stochastic_rounding: bool = False,
    consolidate: bool = False,
    accept_adamw: bool = False,
    **options: Any,
) -> Optimizer:
    """A torch.optim.Optimizer for a whole model: the method for its matrices, AdamW for the rest.

    There is one parameter group per role, or more where settings differ; `group["role"]` names the
    role. State is keyed by the model's parameter names. To see what every parameter gets,
    `print(funshampoo.routing_table(optimizer))`. Stacked experts, and query, key and value in one
    weight, are taken apart by `blocks.Stacked`, for every method that treats a matrix as more than
    its entries. A block with a non-finite gradient skips the step. In "adamw", "sgd", "lion" and
    "sign_descent", for any role, the whole parameter does, unless their options say guard=False.

    Args:
        model: a module. Tied parameters are taken once; frozen ones are included, but wait.
        method: a name in `funshampoo.recipes.RECIPES`, or a recipe: a function of the learning
            rate, and of `merge` if it is to distinguish the matrices of a stack.
        lr: the method's learning rate.
        other_lr: the learning rate of everything else, such as the one you used for AdamW. None:
            lr, if the steps of both methods are as long as Adam's (`recipes.OF_ADAMS_LENGTH`);
            else the default of `others`, 1e-3 for AdamW.
        others, other_options: a name or a recipe, and its arguments, such as betas. Unless these
            say otherwise, vectors do not decay.
        method_roles: the roles that get the method.
        overrides: {pattern: role, or settings}: see `roles`. Settings that are not part of a role
            go into the parameters' group: its own lr, weight_decay, max_size, or method. A method
            that is neither `method` nor `others` has its recipe's default lr: give one with it.
        heads: see `roles`.
        scale_rates, base: with "mup", lr and other_lr are the ones tuned on `base`, a narrower
            model with the same names, or {name: shape} of it. Each parameter gets that rate times a
            factor from its fans, kept in `group["rate_factor"]`; see docs/transfer.md.
        compile, cuda_graph, tf32, stochastic_rounding, consolidate, accept_adamw: see `Optimizer`.
        options: the method's, by torch.optim's names: betas, weight_decay, every, ... They don't
            reach `others`: AdamW's weight_decay stays 0.01 unless other_options sets it. Shampoo's
            exponents are 1/3 and its beta3 is "nesterov", beta1², and those of
            `recipes.LOOK_AHEAD`, SOAP among them, have nesterov=True, which did better than the
            papers' (docs/family.md): for these, give exponents=None, beta3=None, nesterov=False.

    Returns:
        The `Optimizer`. A scheduler multiplies all groups' rates; for a scheduler that sets them,
        pass a list, one per group.

    Warns about expensive choices: a large embedding or head with a matrix method, a parameter whose
    state is many times AdamW's. Also if no parameter gets the method, or if the method can't
    distinguish the matrices of a stack.

    Raises:
        TypeError: model is not a module; an option that the method does not know; lr is missing.
        ValueError: an unknown method (suggests the nearest), role or pattern; a model without
            parameters, or with all of them frozen; scale_rates without base, or for a method that
            has no rule; a parameter that base lacks.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = for_model(model, "soap", lr=3e-3, weight_decay=0.1)
    >>> [(g["role"], g["param_names"], g["lr"]) for g in optimizer.param_groups]
    [('matrix', ['0.weight'], 0.003), ('head', ['2.weight'], 0.003), \
('vector', ['0.bias', '2.bias'], 0.003)]
    """
    main, rest = recipe_of("method", method), recipe_of("others", others)
    _check_method_roles(method_roles)
    check_choice("scale_rates", scale_rates, (None, "mup"))
    if (scale_rates is None) is not (base is None):
        raise ValueError("scale_rates='mup' and base go together: base is the model tuned before.")
    _check_model(model)
    found = kinds(model, overrides, heads)
    parameters = dict(model.named_parameters())
    extra = {n: extra_settings(s) for n, s in settings_of(found, overrides).items()}
    _check_options(main, rest, lr, options)
    own = {"lr": lr, **options}
    plain = _of_others(
        rest, other_lr, other_options, lambda given: rate_of_others(rest, given, main, own)
    )
    routes = Routes(main, own, rest, plain, frozenset(method_roles))
    settings = {n: routes.settings(kind, extra[n]) for n, kind in found.items()}
    if base is not None:
        factors = rate_factors_of(parameters, found, base, settings)
        settings = {n: scaled(s, factors[n]) for n, s in settings.items()}
    warn_of_routes(routes, settings)
    flags: Any = {"compile": compile, "consolidate": consolidate, "accept_adamw": accept_adamw}
    flags |= {"cuda_graph": cuda_graph, "tf32": tf32, "stochastic_rounding": stochastic_rounding}
    defaults = {**for_new_runs(main), **options}
    optimizer = Optimizer(grouped(parameters, settings), main, lr=lr, **flags, **defaults)
    optimizer._model_order = [name for name in parameters if name in settings]
    warn_of_costs(optimizer)
    return optimizer


def _check_method_roles(method_roles: Any) -> None:
    if isinstance(method_roles, str) or not isinstance(method_roles, Collection):
        raise TypeError(f"method_roles is {method_roles!r}; give a list of roles.")
    for role in method_roles:
        check_choice("method_roles", role, ROLES)


def _check_options(main: Recipe, rest: Recipe, lr: Any, options: Mapping[str, Any]) -> None:
    """Raise for an option that the method does not take, such as `guard`, which others have."""
    try:
        Vocabulary(main, options).defaults({"lr": lr, **options})
    except TypeError as error:
        for name in inspect.signature(rest).parameters.keys() & options.keys():
            if f"no hyperparameter '{name}'" in str(error):
                remedy = f"What the other roles have takes it: other_options={{'{name}': ...}}."
                raise TypeError(f"{error} {remedy}") from error
        raise


def _of_others(
    rest: Recipe, rate: Any, options: Any, default: Callable[..., Any]
) -> dict[str, Any]:
    """The arguments of the other recipe, by torch.optim's names."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"other_options is {options!r}; give a dict of arguments.")
    own = dict(options or {})
    if rate is not None and "lr" in own:
        raise TypeError("other_lr and the 'lr' of other_options are one number: give one of them.")
    plain = {"lr": default(own) if rate is None and "lr" not in own else rate, **own}
    Vocabulary(rest, plain).defaults(plain)  # raises for an option that it does not take
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
