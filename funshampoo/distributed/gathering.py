"""Gathering the parts of a state from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.core.placed import any_in_parts, is_in_parts
from funshampoo.core.tree import map_leaves
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects, rank_and_size


def sharing_groups(
    transformation: GradientTransformation | None, parameters: Iterable[Any] = ()
) -> list[ProcessGroup | None]:
    """The groups of ranks over which a chain shards its state; [] on one rank.

    Args:
        parameters: of which it may not have made a state yet.
    """
    found: list[ProcessGroup | None] = []
    for spread in spreads(transformation, any_in_parts(parameters)):
        group = spread.group
        if rank_and_size(group)[1] > 1 and not any([group is other for other in found]):
            found.append(group)
    return found


def gathered(
    transformation: GradientTransformation | None, mine: Mapping[str, Any]
) -> dict[str, Any]:
    """The union of the state on all ranks that share this chain; its own entries take precedence.

    A collective, if there are several ranks: all of them must call it.
    """
    found = {name: x for name, x in mine.items() if not is_in_parts(x)}
    for group in sharing_groups(transformation):
        for part in gathered_objects(on_the_host(found), group):
            found = {**part, **found}
    return {**found, **mine}  # each rank keeps its own part of DTensors


def collected(group: ProcessGroup | None, mine: Any, to: int | None) -> list[Any] | None:
    """What every rank of a group contributes, on the host; None on ranks that do not get it.

    Args:
        mine: tensors in dicts and lists.
        to: the rank in the group; None: all.
    """
    rank, size = rank_and_size(group)
    mine = on_the_host(mine)
    if to is None:
        return gathered_objects(mine, group)
    parts: list[Any] = [None] * size
    target = to if group is None else dist.get_global_rank(group, to)
    dist.gather_object(mine, parts if rank == to else None, dst=target, group=group)
    return parts if rank == to else None


def all_succeeded(meshes: Iterable[Any], succeeded: bool) -> bool:
    """Whether no rank of these meshes has failed. A collective of one number per mesh dimension."""
    for mesh in dict.fromkeys(meshes):
        failed = torch.tensor(not succeeded, dtype=torch.int32, device=mesh.device_type)
        for side in range(mesh.ndim):
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=mesh.get_group(side))
        succeeded = not failed.item()
    return succeeded


def without_parts(tree: Any) -> Any:
    """The tree, with DTensors as whole tensors on the host. A collective over each one's mesh."""
    return map_leaves(lambda x: x.full_tensor().cpu() if is_in_parts(x) else x, tree)


def on_the_host(tree: Any) -> Any:
    """The tree on the CPU: a pickled device tensor would go to the device with the same number."""
    return map_leaves(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, tree)


def spreads(transformation: GradientTransformation | None, in_parts: bool = False) -> Iterator[Any]:
    """The `Ranks` of every part of a chain, at any depth, that is spread over ranks.

    Args:
        in_parts: whether it will be, though no state was made yet, because parameters are DTensors.
    """
    if transformation is None:
        return
    if transformation.spread is not None and (in_parts or transformation.spread.in_use):
        yield transformation.spread
    for part in transformation.parts.values():
        yield from spreads(part, in_parts)
