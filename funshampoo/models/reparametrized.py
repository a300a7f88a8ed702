"""Weights that torch.nn.utils makes of other parameters: whose they are, and of what."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_OF_HOOKS = ("g", "v", "orig")
"""What torch.nn.utils.weight_norm and spectral_norm add to the name of the weight."""


def layer_of(modules: Mapping[str, nn.Module], prefix: str, attribute: str) -> tuple[str, str]:
    """Whose weight a parameter is, or is made into: the module's name, and the weight's there.

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
    """The weight, or the parameters of a linear layer's shape that it is made of.

    The weight itself is not asked for: to make it may change the layer, as spectral_norm does.
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
    """The modules that make weights of other parameters."""
    lists = [m for m in model.modules() if isinstance(m, ParametrizationList)]
    return {inner for found in lists for inner in found.modules()}
