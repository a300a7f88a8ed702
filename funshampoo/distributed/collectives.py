"""The collectives, by the names that this release of torch has for them, and where they may run.

By them, what every rank has of a state is brought together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.contract import GradientTransformation
from funshampoo.core.placed import is_in_parts
from funshampoo.core.tree import map_leaves

ProcessGroup = Any  # torch.distributed.ProcessGroup, where torch is built with it


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """(rank, number of ranks) in a group; (0, 1) where torch.distributed is not initialized.

    Raises:
        ValueError: this process is no member of the group.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank: int = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "process_group: this process is no member of the group. Give each process the group "
            "that it belongs to; torch.distributed.new_group returns one in its members alone."
        )
    return rank, dist.get_world_size(group)


_LOST = (
    "sharded: the ranks did not meet in the collective of this step; the error above is "
    "torch.distributed's. Another rank was killed or interrupted, raised an error outside of the "
    "optimizer (its own output says so), left out a step, or has other parameters. Or its data "
    "ended before this rank's: DistributedDataParallel.join() does not know of the optimizer's "
    "collective; give all ranks equally many steps, or join both, by "
    "torch.distributed.algorithms.join.Join([model, optimizer]). This step moved no parameter; a "
    "donated state is spent: go on from a checkpoint."
)


class LostRanksError(RuntimeError):
    """The ranks did not meet in a collective, so that another one would wait in vain."""


def all_gather_into(output: Tensor, shard: Tensor, group: ProcessGroup | None) -> None:
    """Fill `output`, (ranks · n,), with the shards, (n,), of all ranks, in their order.

    Raises:
        LostRanksError: not all ranks came; from torch.distributed's error.
    """
    gather: Callable[..., Any] | None = getattr(dist, "all_gather_single", None)  # from torch 2.13
    try:
        (gather or dist.all_gather_into_tensor)(output, shard, group=group)
    except RuntimeError as error:
        raise LostRanksError(_LOST) from error


def all_to_all_into(
    output: Tensor,
    lengths: list[int],
    mine: Tensor,
    splits: list[int],
    group: ProcessGroup | None,
    wait: bool = True,
) -> Callable[[], None]:
    """Send each rank its part of `mine`, cut at `splits`, and fill `output` with what they send.

    Args:
        wait: until `output` is filled; on CUDA the stream does. If not, neither tensor may be
            touched before what is returned was called.

    Returns:
        A function that waits.

    Raises:
        LostRanksError: not all ranks came; from torch.distributed's error. The function, too.
    """
    try:
        work = dist.all_to_all_single(output, mine, lengths, splits, group=group, async_op=not wait)
    except RuntimeError as error:
        raise LostRanksError(_LOST) from error

    def arrived() -> None:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise LostRanksError(_LOST) from error

    return arrived


def gathered_objects(mine: Any, group: ProcessGroup | None) -> list[Any]:
    """What every rank has, in their order; by pickle."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def check_outside_transforms(what: str) -> None:
    """Collectives see one rank's plain tensors: under vmap or grad they would return garbage.

    Raises:
        RuntimeError: inside a torch.func transform or torch.compile.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"{what} can't be compiled: it talks to other ranks. Compile the loss and its "
            "gradient, and call update outside."
        )
    if _functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{what} can't run inside torch.func.vmap or grad: it talks to other ranks. Take the "
            "gradient inside, and call update outside of the transform."
        )


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
