"""The role that every parameter of a model plays."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funshampoo.core.checks import check_choice
from funshampoo.core.tree import flatten, leaf_names
from funshampoo.models.kinds import Heads, Kind, is_transposed_linear, kind_of, kind_of_shape
from funshampoo.models.output import output_weights
from funshampoo.models.overrides import Overrides, overridden, settings_of
from funshampoo.models.reparametrized import layer_of


def roles(
    model_or_params: Any, overrides: Overrides | None = None, *, heads: Heads = "fused"
) -> Any:
    """{parameter: its role}: which parameters are matrices, and which had better be left to AdamW.

    - "matrix": the weight of a linear layer, (outputs, inputs) or, in transformers' Conv1D, the
      other way round.
    - "convolution": a kernel.
    - "embedding": a table of which rows are read, or positions: what is added to such rows.
    - "head": the weight that makes the outputs, also where it is tied to an embedding; see
      `models.output.output_weights`.
    - "experts": a stack of matrices, (experts, ., .).
    - "heads": query, key and value in one weight: nn.MultiheadAttention.in_proj_weight, and c_attn
      of transformers' GPT-2. Other modules don't say in which order they have them: name them in
      `overrides`.
    - "vector": everything of one side or none, biases of experts, and scales of norms.

    Of a module it goes by types, shapes and what is tied, never by names. A parameter that several
    modules have is one entry under its first name, as in `named_parameters`; frozen ones are there.
    Of what a weight is made of (weight_norm, spectral_norm and other parametrizations) lengths are
    vectors, and the rest is what the weight would be.

    Args:
        model_or_params: a module; or any tree of tensors, which has no types, so that the shape
            alone decides: one side or none (but for sides of 1) a vector, two a matrix, three a
            stack of experts (so name the kernels of 1-d convolutions in overrides), more a
            convolution, and (1, n, width) an embedding, for it is broadcast.
        overrides: {pattern: role}, or {pattern: {"role": ..., "axis": ..., "parts": ...}} where a
            weight is several matrices, as `blocks.Stacked` has them; patterns as in fnmatch
            ("*.c_attn.weight"), the last that fits wins. Other settings are `for_model`'s.
        heads: "fused" takes query, key and value apart; "each" takes every head of them apart, and
            those of q_proj_weight, k_proj_weight and v_proj_weight in nn.MultiheadAttention;
            "whole" makes a matrix of all.

    Returns:
        Of a module {name: role}; of a tree the same tree with roles for leaves. Labels for
        `partition({"matrix": ..., "vector": ...}, labels)`.

    Raises:
        TypeError: something else than a module or a tree of tensors; overrides of another type.
        ValueError: a pattern that fits no name, a role that there is not or that does not go with
            the shape, a lazy parameter that has no shape yet: named.

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
    """{name of a parameter: what it is}; see `roles`."""
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
        tied = any(isinstance(m, nn.Embedding) for m in users) and any(map(_is_linear, users))
        found[name] = Kind("head") if tied or p in outputs else kind
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module)
