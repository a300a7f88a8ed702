"""Names for the tensors of a state.

A name says what a tensor is, not where it happens to be stored:

    conv1.weight/block_0_1/kronecker_statistics/factors/0    a block's, in block space
    conv1.weight/trace/buffer                                a leaf's, outside
    graft/steps                                              no one's, such as a counter

So it does not depend on stacks, ranks, or a stage's position among others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.state.meaning import kind_of
from funshampoo.state.nodes import walk
from funshampoo.state.parts import RUN
from funshampoo.state.places import Place, map_tensors, rows_of, spans_of, walk_blocks
from funshampoo.state.stages import HyperparamsState, Kept, ShardedState


class Named(NamedTuple):
    """A tensor of a state, or one block's part of it.

    Attributes:
        owner: the parameter, or "".
        rest: the rest of the name.
        path: the end of the name, without the block.
        kind: its meaning; see `funshampoo.state.meaning`.
        x: a view; or a value for it, from a checkpoint.
        dtype: in the state.
    """

    owner: str
    rest: str
    path: str
    kind: str
    x: Tensor
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name in a checkpoint."""
        return "/".join(filter(None, self[:2]))


def named(state: Any) -> list[Named]:
    """Every tensor of a state.

    Raises:
        ValueError: two of them have the same name.
    """
    found: list[Named] = []
    more = _said_above(state)

    def collect(place: Place, x: Tensor) -> None:
        found.extend(entries_of(place, x, more.get(id(x), "")))

    map_tensors(collect, state)
    _check_apart([entry[:2] for entry in found])
    return found


def _said_above(state: Any) -> dict[int, str]:
    """{id of a tensor: its kind}, if declared by a node above the one that contains it."""
    found: dict[int, str] = {}
    for _, node in walk(state):
        if isinstance(node, HyperparamsState):
            for name, x in node.hyperparams.items():
                before = found.get(id(x), kind_of(HyperparamsState, "hyperparams"))
                found[id(x)] = " ".join([before, *node.ranges.get(name, ())])
        for field in getattr(node, "_fields", ()):
            if kind_of(type(node), field) == "orthonormal":
                kept = [x for _, x in walk(getattr(node, field)) if isinstance(x, Kept)]
                found.update({id(x.value[0]): "orthonormal" for x in kept})
    return found


def named_tensors(state: Any) -> list[tuple[str, str, Tensor]]:
    """(parameter or "", rest of the name, view) for every tensor of `state_dict`.

    Raises:
        ValueError: two of them have the same name.
    """
    return [(entry.owner, entry.rest, entry.x) for entry in named(state)]


def _check_apart(names: list[tuple[str, str]]) -> None:
    if len(set(names)) < len(names):
        owner, rest = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(
            f"two tensors of the state would be saved as '{owner}/{rest}': give the two stages "
            "different names, as in chain(('slow', trace(0.9)), ...); two combinators of a kind, "
            "one right inside of the other, such a chain between them."
        )


_UNNAMED = (
    ("sharded", "report"),  # recomputed by steps
    RUN,  # stored in a checkpoint's part entry: "funshampoo/part"
)


def entries_of(place: Place, x: Tensor, kind: str = "") -> list[Named]:
    """The entries of one tensor: one for every block in it, or for the tensor.

    Args:
        kind: by default, as its own node declares.
    """
    if place.path[-2:] in _UNNAMED:
        return []
    path = "/".join(place.path) or "state"
    kind = kind or kind_of(place.kind, place.field)
    if place.stack is None:
        return [Named(".".join(place.leaf), path, path, kind, x, x.dtype)]
    owners = place.owners()
    if x.ndim and x.shape[0] != len(owners):
        raise ValueError(
            f"'{path}' has shape {tuple(x.shape)} for the {len(owners)} blocks of stack "
            f"'{place.stack}': in block space the first axis counts blocks. The members of an "
            "ensemble (vmap) are saved one by one, or all together by torch.save."
        )
    values = x.unbind(0) if x.ndim else [x] * len(owners)
    return [
        Named(parameter, f"{block}/{path}", path, kind, value, x.dtype)
        for (parameter, block), value in zip(owners, values)
    ]


def owned_elsewhere(state: Any) -> list[str]:
    """Names of what other ranks own: blocks such as "conv1.weight/block_0_1", or leaves."""
    found: list[str] = []
    for _, node, around in walk_blocks(state):
        if isinstance(node, ShardedState) and around is not None:
            for parameter, stack, span in spans_of(around.layout):
                own = set(rows_of(node.owned.get(stack, {})))
                rows = zip(range(span.first, span.last), span.blocks())
                found += [f"{parameter}/{block}" for row, block in rows if row not in own]
        elif isinstance(node, ShardedState):
            found += [leaf for leaf, where in node.owned.items() if "elsewhere" in where]
    return found
