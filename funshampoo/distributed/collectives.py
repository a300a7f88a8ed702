"""The collectives, by the names in this release of torch, and where they may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _functorch

ProcessGroup = Any  # torch.distributed.ProcessGroup, if torch is built with it


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """(rank, number of ranks) in a group; (0, 1) if torch.distributed is not initialized.

    Raises:
        ValueError: this process is not a member of the group.
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
    """The ranks did not meet in a collective, so another one would wait in vain."""


def all_gather_into(output: Tensor, shard: Tensor, group: ProcessGroup | None) -> None:
    """Fill `output`, (ranks · n,), with the shards, (n,), of all ranks, in rank order.

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
        wait: wait until `output` is filled; on CUDA, the stream waits. If False, neither tensor may
            be touched before the returned function has been called.

    Returns:
        A function that waits.

    Raises:
        LostRanksError: not all ranks came; from torch.distributed's error. Also by the function.
    """
    try:
        work = dist.all_to_all_single(output, mine, lengths, splits, group=group, async_op=not wait)
    except RuntimeError as error:
        raise LostRanksError(_LOST) from error

    def finish() -> None:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise LostRanksError(_LOST) from error

    return finish


def gathered_objects(mine: Any, group: ProcessGroup | None) -> list[Any]:
    """The objects of all ranks, in rank order; by pickle.

    Raises:
        RuntimeError: numpy is not installed, which torch needs for it.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, mine, group=group)
    except RuntimeError as error:
        if "Numpy is not available" not in str(error):
            raise
        raise RuntimeError(
            "the ranks can't compare what they were given: torch's collectives of objects need "
            "numpy. Install it for every rank: pip install numpy."
        ) from error
    return found


def check_outside_transforms() -> None:
    """Refuse transforms: collectives see one rank's plain tensors and would return garbage there.

    Raises:
        RuntimeError: inside a torch.func transform or torch.compile.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "sharded can't be compiled: it talks to other ranks. Compile the loss and its "
            "gradient, and call update outside."
        )
    if _functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "sharded can't run inside torch.func.vmap or grad: it talks to other ranks. Take the "
            "gradient inside, and call update outside of the transform."
        )
