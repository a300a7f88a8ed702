"""Rates for a wider model from those of a narrower one; derived in docs/transfer.md."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from funshampoo.blocks.layout import merged_shape
from funshampoo.blocks.stacked import Stacked
from funshampoo.core.bare import bare_names
from funshampoo.models.kinds import Kind
from funshampoo.operators.exponents import side_exponents
from funshampoo.operators.shape_scale import shape_factor
from funshampoo.plan.planner import meta_parameters
from funshampoo.recipes import RECIPES

Base: TypeAlias = nn.Module | Mapping[str, Any]
Arguments: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Kind, tuple[int, ...], Arguments], float]


def rate_factors_of(
    parameters: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    base: Base,
    settings: Mapping[str, Arguments],
) -> dict[str, float]:
    """{parameter: the factor on its rate}: rule(its shape) / rule(its shape in base).

    Args:
        settings: {parameter: its method under "method", and the method's arguments}.

    Raises:
        ValueError: base lacks a parameter, or has it with another number of sides; a method has no
            rule, or none for these arguments. The error names it.
    """
    if isinstance(base, nn.Module):
        base = {name: p.detach() for name, p in base.named_parameters()}
    if not isinstance(base, Mapping):
        raise TypeError(
            f"base is {base!r}; give the module tuned before, or {{name: shape}} of it."
        )
    narrow = meta_parameters(base, torch.float32)
    narrow = dict(zip(bare_names(narrow), narrow.values()))
    found = {}
    for (name, p), bare in zip(parameters.items(), bare_names(parameters)):
        if bare not in narrow:
            raise ValueError(
                f"base has no '{name}': it has to be the same model, narrower, with as many layers."
            )
        now, before = tuple(p.shape), tuple(narrow[bare].shape)
        if len(now) != len(before):
            raise ValueError(f"'{name}' has the shape {now}, and {before} in base.")
        rule, arguments = _rule_of(name, settings[name])
        found[name] = rule(kinds[name], now, arguments) / rule(kinds[name], before, arguments)
    return found


def _rule_of(name: str, settings: Arguments) -> tuple[Rule, Arguments]:
    method = settings["method"]
    known = next((n for n, recipe in RECIPES.items() if recipe is method), None)
    if known not in RULES:
        raise ValueError(
            f"scale_rates: '{name}' gets {known or getattr(method, '__name__', 'a method')}, for "
            f"which no rule is known; there is one for {', '.join(RULES)}. Leave scale_rates out, "
            "or give a rate in overrides and the parameter another method."
        )
    defaults = {n: p.default for n, p in inspect.signature(method).parameters.items()}
    return RULES[known], {**defaults, **settings}


def adam_rule(kind: Kind, shape: tuple[int, ...], arguments: Arguments) -> float:
    """1 / inputs: every entry of an update is about one, whatever the gradient's size."""
    return 1 / kind.fans(shape)[1]


def sgd_rule(kind: Kind, shape: tuple[int, ...], arguments: Arguments) -> float:
    """outputs / inputs: the gradient's norm is √(inputs / outputs)."""
    outputs, inputs = kind.fans(shape)
    return outputs / inputs


def muon_rule(kind: Kind, shape: tuple[int, ...], arguments: Arguments) -> float:
    """√(outputs / inputs) / s: all singular values of an update are s."""
    if kind.role in ("vector", "embedding"):
        raise ValueError(
            f"scale_rates: no rule for the role {kind.role} with a method of matrices; leave it to "
            "others."
        )
    outputs, inputs = kind.fans(shape)
    stored = (inputs, outputs) if kind.transposed else (outputs, inputs)
    own = stored if kind.stacked is not None else shape
    return math.sqrt(outputs / inputs) / shape_factor(arguments["scale"], stored, own)


def shampoo_rule(kind: Kind, shape: tuple[int, ...], arguments: Arguments) -> float:
    """With grafting, the grafted method's; without, (outputs / inputs)^(1 - S) / blocks^S.

    S is the sum of the exponents over the sides, 1/2 by default.
    """
    grafting = arguments["grafting"]
    if grafting in ("adam", "rms", "adagrad"):
        return adam_rule(kind, shape, arguments)
    if grafting == "sgd":
        return sgd_rule(kind, shape, arguments)
    if grafting is not None:
        raise ValueError("scale_rates has no rule for grafting onto a transformation of yours.")
    outputs, inputs = kind.fans(shape)
    blocks, order = _cut(shape, arguments)
    total = sum(side_exponents([1] * order, arguments["exponents"], arguments.get("sides")))
    return float((outputs / inputs) ** (1 - total) / blocks**total)


def soap_rule(kind: Kind, shape: tuple[int, ...], arguments: Arguments) -> float:
    """√(outputs / inputs) / (√outputs + √inputs): Adam's entries, about one, but no longer aligned.

    The rotation into the eigenbases turns directions that the gradients share into single entries,
    so that the update's norm is that of a matrix of entries with unrelated signs. Vectors and
    embeddings have Adam's rule.
    """
    outputs, inputs = kind.fans(shape)
    if kind.role in ("vector", "embedding"):
        return adam_rule(kind, shape, arguments)
    return math.sqrt(outputs / inputs) / (math.sqrt(outputs) + math.sqrt(inputs))


def _cut(shape: tuple[int, ...], arguments: Arguments) -> tuple[int, int]:
    """(blocks of a matrix, sides of a block)."""
    merge, max_size = arguments["merge"], arguments["max_size"]
    sides = merged_shape(shape, max_size, merge, arguments.get("keep", 2))
    if isinstance(merge, Stacked):
        sides = sides[: merge.axis] + sides[merge.axis + 1 :]
    return math.prod(-(-side // (max_size or side)) for side in sides), len(sides)


RULES: dict[str, Rule] = {
    "adamw": adam_rule,
    "lion": adam_rule,
    "muon": muon_rule,
    "normuon": muon_rule,
    "sgd": sgd_rule,
    "shampoo": shampoo_rule,
    "soap": soap_rule,
    "spectral_descent": muon_rule,
}
"""{recipe: the rate at which a step has the right length for its layer, up to a constant}."""
