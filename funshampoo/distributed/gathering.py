"""What every rank has of a state, brought together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.core.placed import is_in_parts
from funshampoo.core.tree import map_leaves
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects, rank_and_size


def sharing_groups(transformation: GradientTransformation | None) -> list[ProcessGroup | None]:
    """The groups of ranks over which a chain shares out its state; [] on one rank."""
    found: list[ProcessGroup | None] = []
    for spread in spreads(transformation):
        group = spread.group
        if rank_and_size(group)[1] > 1 and not any([group is other for other in found]):
            found.append(group)
    return found


def gathered(
    transformation: GradientTransformation | None, mine: Mapping[str, Any]
) -> dict[str, Any]:
    """The union of what the ranks that share this chain's state have; this rank's own comes first.

    A collective, where there are several ranks: all of them have to call it.
    """
    found = {name: x for name, x in mine.items() if not is_in_parts(x)}
    for group in sharing_groups(transformation):
        for part in gathered_objects(on_the_host(found), group):
            found = {**part, **found}
    return {**found, **mine}  # of DTensors each has its own, and keeps it


def collected(group: ProcessGroup | None, mine: Any, to: int | None) -> list[Any] | None:
    """What every rank of a group gives, on the host; None on ranks that are not to get it.

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


def are_well(meshes: Iterable[Any], well: bool) -> bool:
    """Whether all ranks of these meshes are. A collective, of one number a side of each."""
    for mesh in dict.fromkeys(meshes):
        ill = torch.tensor(not well, dtype=torch.int32, device=mesh.device_type)
        for side in range(mesh.ndim):
            dist.all_reduce(ill, dist.ReduceOp.MAX, group=mesh.get_group(side))
        well = not ill.item()
    return well


def without_parts(tree: Any) -> Any:
    """Its DTensors as whole tensors on the host. A collective over the mesh of each."""
    return map_leaves(lambda x: x.full_tensor().cpu() if is_in_parts(x) else x, tree)


def on_the_host(tree: Any) -> Any:
    """Its tensors on the CPU: a pickle of one on a device goes to the device of that number."""
    return map_leaves(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, tree)


def spreads(transformation: GradientTransformation | None) -> Iterator[Any]:
    """How the parts of a chain, at any depth, are spread over ranks, as far as they are."""
    if transformation is None:
        return
    if transformation.spread is not None and transformation.spread.in_use:
        yield transformation.spread
    for part in transformation.parts.values():
        yield from spreads(part)
