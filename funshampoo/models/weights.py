"""The weight that a parameter is, or is a part of, and the weights that make a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from funshampoo.models.kinds import is_linear

_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def output_weights(model: nn.Module) -> set[Tensor]:
    """The weights of the layers that make a model's outputs, by identity; often just one.

    Those of `get_output_embeddings()`, if the model has that method and it returns any. Else linear
    layers of an embedding's shape, (vocabulary, width). Else the last layer of the model that has a
    weight, in the order of registration, if it is linear. Layers that are repeated (inside an
    nn.ModuleList, or one of several modules of one type in an nn.Sequential) or belong to an
    attention module are never outputs.
    """
    for module in model.modules():
        answer = getattr(module, "get_output_embeddings", None)
        if callable(answer):
            layer = answer()
            layers = layer if isinstance(layer, nn.ModuleList) else [layer]  # one per codebook
            found = [p for m in layers if isinstance(m, nn.Module) for p in weights_of(m)]
            if found:
                return set(found)
            break
    once = list(_not_repeated(model))
    linear = [p for m in once if isinstance(m, nn.Linear) for p in weights_of(m)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = {(m.num_embeddings, m.embedding_dim) for m in embeddings}
    # A square table is no evidence, since hidden matrices have the same shape.
    oblong = {shape for shape in tables if shape[0] != shape[1]}
    shaped: set[Tensor] = {p for p in linear if tuple(p.shape) in oblong}
    if shaped:
        return shaped
    makers = inside_parametrizations(model)
    last = [m for m in model.modules() if m not in makers and _has_matrix(m)][-1:]
    return {p for m in last if isinstance(m, nn.Linear) and m in once for p in weights_of(m)}


def _has_matrix(module: nn.Module) -> bool:
    shapes = [p.shape for p in module.parameters(recurse=False)]
    return is_linear(module) or any(sum(n != 1 for n in shape) > 1 for shape in shapes)


def _not_repeated(model: nn.Module) -> set[nn.Module]:
    inside: set[nn.Module] = set()
    for module in model.modules():
        children = [m for m in module.children() if any(True for _ in m.children())]
        types = [type(m) for m in children]
        if isinstance(module, _WHOLE):
            inside |= set(module.modules())
        elif isinstance(module, nn.ModuleList):
            inside |= {m for child in children for m in child.modules()}
        elif isinstance(module, nn.Sequential):
            again = [m for m in children if types.count(type(m)) > 1]
            inside |= {m for child in again for m in child.modules()}
    return set(model.modules()) - inside


_OF_HOOKS = ("g", "v", "orig")
"""What torch.nn.utils.weight_norm and spectral_norm add to the name of the weight."""


def layer_of(modules: Mapping[str, nn.Module], prefix: str, attribute: str) -> tuple[str, str]:
    """(module's name, weight's name in it) for the weight that a parameter is or is a part of.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> modules = dict(layer.named_modules())
    >>> layer_of(modules, "parametrizations.weight", "original0"), layer_of(modules, "", "bias")
    (('', 'weight'), ('', 'bias'))
    """
    module = modules[prefix]
    if isinstance(module, ParametrizationList):
        place, _, weight = prefix.rpartition(".")
        return place.rpartition(".")[0], weight
    weight, _, kind = attribute.rpartition("_")
    if kind in _OF_HOOKS and weight in vars(module):
        return prefix, weight
    return prefix, attribute


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """The weight or, if it is computed from parameters, those of a linear layer's shape.

    Such a weight is not read, since computing it may change the layer, as in spectral_norm.
    """
    own = layer._parameters.get("weight")
    if own is not None:
        return [own]
    shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    parts = list(layer.parameters(recurse=False))
    made = layer._modules.get("parametrizations")
    if isinstance(made, nn.ModuleDict) and "weight" in made:
        parts += made["weight"].parameters(recurse=False)
    return [p for p in parts if tuple(p.shape) == shape]


def inside_parametrizations(model: nn.Module) -> set[nn.Module]:
    """The modules that make weights from other parameters."""
    lists = [m for m in model.modules() if isinstance(m, ParametrizationList)]
    return {inner for found in lists for inner in found.modules()}
