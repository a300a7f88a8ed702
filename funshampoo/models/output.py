"""Which linear layer is a model's output."""

from __future__ import annotations

from torch import Tensor, nn

from funshampoo.models.kinds import is_transposed_linear
from funshampoo.models.reparametrized import inside_parametrizations, weights_of

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
    shaped: set[Tensor] = {p for p in linear if tuple(p.shape) in tables and _is_oblong(p)}
    if shaped:
        return shaped
    makers = inside_parametrizations(model)
    last = [m for m in model.modules() if m not in makers and _has_matrix(m)][-1:]
    return {p for m in last if isinstance(m, nn.Linear) and m in once for p in weights_of(m)}


def _is_oblong(weight: Tensor) -> bool:
    """A table of as many rows as columns says nothing: hidden matrices have its shape, too."""
    return weight.shape[0] != weight.shape[1]


def _has_matrix(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) or is_transposed_linear(module)
    return linear or any(sum(n != 1 for n in p.shape) > 1 for p in module.parameters(recurse=False))


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
