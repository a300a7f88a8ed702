"""What a parameter is, from the type of its module and from its shape."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from funshampoo.blocks.stacked import Stacked

Role: TypeAlias = Literal[
    "matrix", "convolution", "embedding", "head", "experts", "heads", "vector"
]
Heads: TypeAlias = Literal["fused", "each", "whole"]

ROLES: tuple[Role, ...] = get_args(Role)

_LISTS = (nn.ParameterList, nn.ParameterDict)


class Kind(NamedTuple):
    """What a parameter is.

    Attributes:
        role: see `roles`.
        stacked: how it is taken apart, if it is several matrices.
        transposed: whether it is stored as (inputs, outputs), not (outputs, inputs).
    """

    role: Role
    stacked: Stacked | None = None
    transposed: bool = False

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """(outputs, inputs) of the matrix that it is, or of each of its matrices.

        1 input for an embedding, read row by row, and for a vector, which multiplies or is added.

        >>> Kind("matrix").fans((64, 32)), Kind("convolution").fans((16, 8, 3, 3))
        ((64, 32), (16, 72))
        >>> Kind("heads", Stacked(axis=1, parts=3), transposed=True).fans((32, 96))
        (32, 32)
        """
        if self.role == "vector":
            return math.prod(shape), 1
        if self.role == "embedding":
            return shape[0] if self.transposed else shape[-1], 1
        sides = tuple(shape)
        if self.stacked is not None:
            axis = self.stacked.axis
            merged = self.stacked(sides)
            sides = merged[:axis] + merged[axis + 1 :]
        rows, columns, rest = sides[0], sides[1], math.prod(sides[2:])
        return (columns * rest, rows) if self.transposed else (rows, columns * rest)


def kind_of_shape(shape: Sequence[int]) -> Kind:
    """The kind of a parameter of which only the shape is known; see `roles`."""
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
    """The kind of the parameter that a module has under this name.

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
        if kind_of_shape(p.shape).role == "vector":
            return Kind("vector")  # gains of filters, (outputs, 1, 1, 1)
        return Kind("convolution", transposed=isinstance(module, _ConvTransposeNd))
    if is_linear(module):
        plain = isinstance(module, nn.Linear)
        return Kind("matrix") if plain else _of_transposed(p, parent, heads)
    if parent is not None and isinstance(module, _LISTS):
        return _of_other(parent, p)
    return _of_other(module, p)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: torch's, or that of GPT-2 in transformers, (inputs, outputs).

    If transformers' module has not been imported, no model can have the latter.
    """
    known = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, nn.Linear) or (known is not None and isinstance(module, known.Conv1D))


def _of_attention(module: nn.MultiheadAttention, attribute: str, heads: Heads) -> Kind:
    if not attribute.endswith("proj_weight"):
        return Kind("vector")  # biases, including those of (1, 1, width)
    fused = attribute == "in_proj_weight"
    parts = (3 if fused else 1) * (module.num_heads if heads == "each" else 1)
    if heads == "whole" or parts == 1:
        return Kind("matrix")
    return Kind("heads", Stacked(parts=parts))


def _of_transposed(p: Tensor, parent: nn.Module | None, heads: Heads) -> Kind:
    """Query, key and value, if outputs are three times the inputs in a module with `num_heads`."""
    count = getattr(parent, "num_heads", None)
    if heads == "whole" or not isinstance(count, int) or p.shape[1] != 3 * p.shape[0]:
        return Kind("matrix", transposed=True)
    parts = 3 * (count if heads == "each" else 1)
    return Kind("heads", Stacked(axis=1, parts=parts), transposed=True)


def _of_other(module: nn.Module, p: Tensor) -> Kind:
    """By its shape, and by its neighbours in the same module, including its parameter lists."""
    holders = [module, *[m for m in module.children() if isinstance(m, _LISTS)]]
    others = [q for m in holders for q in m.parameters(recurse=False) if q is not p and q.ndim > 1]
    if p.ndim == 2 and any(q.ndim == 3 and len(q) == len(p) > 1 for q in others):
        return Kind("vector")  # the biases of stacked experts
    tables = [m for m in module.children() if isinstance(m, nn.Embedding)]
    if p.ndim == 2 and any(m.embedding_dim == p.shape[1] for m in tables):
        return Kind("embedding")  # positions, beside the tokens to which they are added
    frozen = [m.weight for m in tables if not m.weight.requires_grad]
    oblong = [len(w) for w in frozen if len(w) != w.shape[1] and p.numel() < w.numel()]
    if p.ndim == 2 and not set(oblong).isdisjoint(p.shape):  # a factor of its change, as in LoRA
        return Kind("embedding", transposed=p.shape[1] in oblong)
    found = kind_of_shape(p.shape)
    if found.role != "vector" and not _stands_between_layers(module, p, others):
        return Kind("embedding")
    if found.role == "experts":
        return found._replace(transposed=getattr(module, "is_transposed", False) is True)
    return found


def _stands_between_layers(module: nn.Module, p: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether both sides of the matrix match sides of the layers inside the module.

    A weight maps the output of one layer to the input of another: its sides are sides of theirs, or
    two to four times these, or those of a bare weight before or after it, half of which a gate may
    drop. One side of stacked heads may be a part of a layer's. A tensor that is looked up, added or
    exponentiated shares at most one side with them: positions and latents (n, width), attention
    biases (distances, heads), a state-space model's decays (width, states). True if there are no
    layers to compare with.
    """
    layers = [m for m in module.modules() if m is not module]
    layers = [m for m in layers if is_linear(m) or isinstance(m, _ConvNd)]
    known = {n for m in layers for q in m.parameters() if q.ndim > 1 for n in q.shape[:2]}
    if not known:
        return True
    parts, rows, columns = p.shape if p.ndim == 3 else (1, *p.shape[:2])
    bare = {(q.shape[-2], q.shape[-1]) for q in others}
    if bare & {(columns, 2 * rows), (2 * columns, rows)}:
        return True
    makes = _is_side(rows, known | {n for _, n in bare})
    takes = _is_side(columns, known | {n for n, _ in bare})
    wide = known if parts not in known else set()  # (width, heads, .) is no stack
    return ((makes or parts * rows in wide) and takes) or (makes and parts * columns in wide)


def _is_side(n: int, known: set[int]) -> bool:
    return n in known or any(n % k == 0 and n // k <= 4 for k in known if k >= 4)
