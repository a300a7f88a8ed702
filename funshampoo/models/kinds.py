"""What a parameter is, from the type of its module, its shape, and what is made of it.

Which linear layer is a model's output, and whose weight a parameter is: torch.nn.utils makes
weights of other parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from funshampoo.blocks.stacked import Stacked

Role: TypeAlias = Literal[
    "matrix", "convolution", "embedding", "head", "experts", "heads", "vector"
]
Heads: TypeAlias = Literal["fused", "each", "whole"]

ROLES: tuple[Role, ...] = get_args(Role)


class Kind(NamedTuple):
    """What a parameter is.

    Attributes:
        role: see `roles`.
        stacked: how it is taken apart, if it is several matrices.
        transposed: it is stored (inputs, outputs), not the other way round.
    """

    role: Role
    stacked: Stacked | None = None
    transposed: bool = False

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """(outputs, inputs) of the matrix that it is, or of each of its matrices.

        Of an embedding one row is read at a time, and a vector multiplies or is added: 1 input.

        >>> Kind("matrix").fans((64, 32)), Kind("convolution").fans((16, 8, 3, 3))
        ((64, 32), (16, 72))
        >>> Kind("heads", Stacked(axis=1, parts=3), transposed=True).fans((32, 96))
        (32, 32)
        """
        if self.role == "vector":
            return math.prod(shape), 1
        if self.role == "embedding":
            return shape[-1], 1
        sides = tuple(shape)
        if self.stacked is not None:
            axis = self.stacked.axis
            merged = self.stacked(sides)
            sides = merged[:axis] + merged[axis + 1 :]
        rows, columns, rest = sides[0], sides[1], math.prod(sides[2:])
        return (columns * rest, rows) if self.transposed else (rows, columns * rest)


def kind_of_shape(shape: Sequence[int]) -> Kind:
    """Of a parameter about which nothing else is known; see `roles`."""
    if sum(side != 1 for side in shape) < 2:
        return Kind("vector")
    if len(shape) == 2:
        return Kind("matrix")
    if shape[0] == 1:  # broadcast over a batch, and added: positions
        return Kind("embedding")
    return Kind("experts", Stacked()) if len(shape) == 3 else Kind("convolution")


def kind_of(
    module: nn.Module, attribute: str, p: Tensor, parent: nn.Module | None, heads: Heads
) -> Kind:
    """Of the parameter that a module has under this name.

    Args:
        parent: the module around it.
        heads: see `roles`.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Kind("embedding")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _NormBase):
        return Kind("vector")  # whatever its shape, it multiplies entry by entry
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, attribute, heads)
    if p.ndim < 2:
        return Kind("vector")
    if isinstance(module, _ConvNd):
        return Kind("convolution", transposed=isinstance(module, _ConvTransposeNd))
    if is_linear(module):
        plain = isinstance(module, nn.Linear)
        return Kind("matrix") if plain else _of_transposed(p, parent, heads)
    return _of_other(module, p)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: torch's, or that of GPT-2 in transformers, (inputs, outputs).

    Where that module has not been imported, no model can have one.
    """
    known = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, nn.Linear) or (known is not None and isinstance(module, known.Conv1D))


def _of_attention(module: nn.MultiheadAttention, attribute: str, heads: Heads) -> Kind:
    if not attribute.endswith("proj_weight"):
        return Kind("vector")  # biases, those of (1, 1, width) as well
    fused = attribute == "in_proj_weight"
    parts = (3 if fused else 1) * (module.num_heads if heads == "each" else 1)
    if heads == "whole" or parts == 1:
        return Kind("matrix")
    return Kind("heads", Stacked(parts=parts))


def _of_transposed(p: Tensor, parent: nn.Module | None, heads: Heads) -> Kind:
    """Outputs three times the inputs in a module that counts heads: query, key and value."""
    count = getattr(parent, "num_heads", None)
    if heads == "whole" or not isinstance(count, int) or p.shape[1] != 3 * p.shape[0]:
        return Kind("matrix", transposed=True)
    parts = 3 * (count if heads == "each" else 1)
    return Kind("heads", Stacked(axis=1, parts=parts), transposed=True)


def _of_other(module: nn.Module, p: Tensor) -> Kind:
    """By shape, and by what stands beside it in the same module."""
    own = [x.shape for x in module.parameters(recurse=False)]
    if p.ndim == 2 and any(len(s) == 3 and s[0] == p.shape[0] > 1 for s in own):
        return Kind("vector")  # the biases of stacked experts
    tables = [m for m in module.children() if isinstance(m, nn.Embedding)]
    if p.ndim == 2 and any(m.embedding_dim == p.shape[1] for m in tables):
        return Kind("embedding")  # positions, beside the tokens to which they are added
    found = kind_of_shape(p.shape)
    if found.role == "experts":
        return found._replace(transposed=getattr(module, "is_transposed", False) is True)
    return found


_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def output_weights(model: nn.Module) -> set[Tensor]:
    """The weights of the layers that make a model's outputs, by identity; often of one.

    That of `get_output_embeddings()`, where the model has that method and an answer. Else linear
    layers of an embedding's shape, (vocabulary, width). Else the last layer of the model that has a
    weight, in the order of registration, if it is linear. A layer that is repeated (inside an
    nn.ModuleList, or one of several modules of one type in an nn.Sequential) and one of an
    attention are no outputs.
    """
    for module in model.modules():
        answer = getattr(module, "get_output_embeddings", None)
        if callable(answer):
            layer = answer()
            found = weights_of(layer) if isinstance(layer, nn.Module) else []
            if found:
                return set(found)
            break
    once = list(_not_repeated(model))
    linear = [p for m in once if isinstance(m, nn.Linear) for p in weights_of(m)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = {(m.num_embeddings, m.embedding_dim) for m in embeddings}
    # A table of as many rows as columns says nothing: hidden matrices have its shape, too.
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
