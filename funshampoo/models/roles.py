"""The role of every parameter of a model, and how a user overrides it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funshampoo.blocks.stacked import Stacked
from funshampoo.core.bare import bare_names
from funshampoo.core.checks import check_choice
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.models.kinds import ROLES, Heads, Kind, is_linear, kind_of, kind_of_shape
from funshampoo.models.weights import layer_of, output_weights


def roles(
    model_or_params: Any, overrides: Overrides | None = None, *, heads: Heads = "fused"
) -> Any:
    """{parameter: its role}: which parameters are matrices, and which are better left to AdamW.

    - "matrix": the weight of a linear layer, (outputs, inputs) or, in transformers' Conv1D, the
      other way round.
    - "convolution": a kernel.
    - "embedding": a table read by rows, or positions, which are added to such rows. Also a tensor
      beside layers whose sides don't fit theirs: latents, attention biases, decays of state-space
      models. A bare weight that reads the model's inputs looks the same: name it in overrides.
    - "head": the weight that produces the outputs, also if it is tied to an embedding; see
      `models.weights.output_weights`.
    - "experts": a stack of matrices, (experts, ., .).
    - "heads": query, key and value in one weight: nn.MultiheadAttention.in_proj_weight, and c_attn
      of transformers' GPT-2. Other modules don't tell the order of the three: name those in
      `overrides`.
    - "vector": everything with one side or none, biases of experts, and scales of norms.

    For a module, types, shapes and ties decide, never names. A parameter shared by several modules
    is one entry under its first name, as in `named_parameters`; frozen ones are included. If a
    weight is parametrized (weight_norm, spectral_norm and other parametrizations), lengths are
    vectors, and its other parts have the role of the weight.

    Args:
        model_or_params: a module, or any tree of tensors. A tree has no types, so the shape
            alone decides: one side or none (except for sides of 1) a vector, two a matrix, three a
            stack of experts (so name the kernels of 1-d convolutions in overrides), more a
            convolution, and (1, n, width) an embedding, since it is broadcast.
        overrides: {pattern: role}, or {pattern: {"role": ..., "axis": ..., "parts": ...}} for a
            weight that is several matrices, as in `blocks.Stacked`. Patterns are fnmatch's
            ("*.c_attn.weight"); the last match wins. Other settings are `for_model`'s.
        heads: "fused" takes query, key and value apart; "each" takes every head of them apart, and
            those of q_proj_weight, k_proj_weight and v_proj_weight in nn.MultiheadAttention;
            "whole" keeps all as one matrix.

    Returns:
        For a module, {name: role}; for a tree, the same tree with roles as leaves. Use them as
        labels: `partition({"matrix": ..., "vector": ...}, labels)`.

    Raises:
        TypeError: not a module or a tree of tensors; overrides of another type.
        ValueError: a pattern that matches no name, an unknown role or one that does not fit the
            shape, a lazy parameter that has no shape yet; the error names it.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10))
    >>> roles(model, {"1.bias": "embedding"})  # doctest: +NORMALIZE_WHITESPACE
    {'0.weight': 'embedding', '1.weight': 'matrix', '1.bias': 'embedding', '3.weight': 'head',
     '3.bias': 'vector'}
    """
    found = kinds(model_or_params, overrides, heads)
    if isinstance(model_or_params, nn.Module):
        return {name: kind.role for name, kind in found.items()}
    return flatten(model_or_params)[1].unflatten([kind.role for kind in found.values()])


def kinds(
    model_or_params: Any, overrides: Overrides | None = None, heads: Heads = "fused"
) -> dict[str, Kind]:
    """{name of a parameter: its kind}; see `roles`."""
    check_choice("heads", heads, ("fused", "each", "whole"))
    shapes: dict[str, tuple[int, ...]]
    if isinstance(model_or_params, nn.Module):
        own = dict(model_or_params.named_parameters())
        for name, p in own.items():
            if is_lazy(p):
                raise ValueError(f"'{name}' has no shape yet: run the model once before.")
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        found = _of_model(model_or_params, heads)
    else:
        leaves, _ = flatten(model_or_params)
        if not all([isinstance(leaf, Tensor) for leaf in leaves]):
            raise TypeError(
                "roles takes a module, or a tree of tensors such as dict(model.named_parameters())."
            )
        shapes = {n: tuple(x.shape) for n, x in zip(leaf_names(model_or_params), leaves)}
        found = {name: kind_of_shape(shape) for name, shape in shapes.items()}
    settings = settings_of(shapes, overrides)
    return {n: overridden(n, found[n], shape, settings[n]) for n, shape in shapes.items()}


def _of_model(model: nn.Module, heads: Heads) -> dict[str, Kind]:
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[Tensor, list[tuple[str, str]]] = {}
    for prefix, module in modules.items():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(p, []).append((prefix, attribute))
    outputs = output_weights(model)
    found = {}
    for name, p in model.named_parameters():
        layers = [layer_of(modules, *use) for use in uses[p]]
        users = [modules[prefix] for prefix, _ in layers]
        prefix, weight = layers[0]
        parent = modules[prefix.rpartition(".")[0]] if prefix else None
        kind = kind_of(modules[prefix], weight, p, parent, heads)
        if layers[0] != uses[p][0] and kind_of_shape(p.shape).role == "vector":
            kind = Kind("vector")  # lengths, of weight_norm
        tied = any(isinstance(m, nn.Embedding) for m in users) and any(map(is_linear, users))
        found[name] = Kind("head") if tied or p in outputs else kind
    return found


Overrides: TypeAlias = Mapping[str, str | Mapping[str, Any]]

_OF_KIND = ("role", "axis", "parts")


def settings_of(names: Iterable[str], overrides: Overrides | None) -> dict[str, dict[str, Any]]:
    """{parameter: the settings from all matching patterns}; later patterns override earlier ones.

    Raises:
        TypeError: overrides, or a value, is of another type.
        ValueError: a pattern matches no name; suggests the nearest one.
    """
    known = list(names)
    bare = bare_names(known)  # a pattern for the plain module also fits the compiled one
    found: dict[str, dict[str, Any]] = {name: {} for name in known}
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides is {overrides!r}; give {{pattern: role or settings}}.")
    for pattern, value in (overrides or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides has the pattern {pattern!r}; give a name, or part of one.")
        if not isinstance(value, str | Mapping):
            raise TypeError(
                f"overrides['{pattern}'] is {value!r}; give a role, or a dict of settings."
            )
        fitting = [
            name
            for name, own in zip(known, bare)
            if fnmatchcase(name, pattern) or fnmatchcase(own, pattern)
        ]
        if not fitting:
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise ValueError(
                f"overrides has the pattern '{pattern}', which fits no parameter"
                + (f"; the nearest name is '{nearest[0]}'." if nearest else ": there are none.")
            )
        for name in fitting:
            own = {"role": value} if isinstance(value, str) else dict(value)
            if "role" in own:  # axis and parts were given for another role
                found[name] = extra_settings(found[name])
            found[name] |= own
    return found


def overridden(name: str, kind: Kind, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Kind:
    """What the parameter is, given these settings.

    Raises:
        ValueError: an unknown role, or one that does not fit the shape; names both.
    """
    if not any(key in settings for key in _OF_KIND):
        return kind
    role = settings.get("role", kind.role)
    check_choice(f"the role of '{name}'", role, ROLES)
    if role in ("experts", "heads"):
        kind = kind._replace(role=role, stacked=_stack(name, kind, shape, settings, role))
    elif "axis" in settings or "parts" in settings:
        raise ValueError(f"'{name}' is to be taken apart: give it the role 'heads' or 'experts'.")
    else:
        kind = kind._replace(role=role, stacked=None)
    if role not in ("vector", "embedding") and kind_of_shape(shape).role == "vector":
        raise ValueError(f"'{name}' of shape {shape} is no matrix: its role can't be '{role}'.")
    return kind


def extra_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are for the method."""
    return {key: value for key, value in settings.items() if key not in _OF_KIND}


def _stack(
    name: str, kind: Kind, shape: tuple[int, ...], settings: Mapping[str, Any], role: str
) -> Stacked:
    known = kind.stacked or Stacked()
    if role == "heads" and kind.role != "heads" and "parts" not in settings:
        raise ValueError(
            f"'{name}' is to be taken apart by heads: say how many matrices it is, by "
            "{'role': 'heads', 'parts': ..., 'axis': ...}."
        )
    parts = settings.get("parts", known.parts if role == kind.role else None)
    stack = Stacked(settings.get("axis", known.axis), parts)
    try:
        stack(shape)
    except ValueError as error:
        raise ValueError(f"'{name}' can't have the role '{role}': {error}") from None
    return stack
