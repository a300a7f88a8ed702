"""Uneven inputs: what torch.distributed.algorithms.join.Join needs from an optimizer.

    with Join([model, optimizer]):          # the DistributedDataParallel first
        for batch in mine: ...; optimizer.step()

A rank whose data has ended continues to step, with the others' gradients, until all have ended: it
owns blocks, and its averages have to stay the same as the others'. Its gradients are those of a
rank that still has data, and so are its groups' numbers, which its own scheduler no longer sets. On
a step with all ranks, this costs one sum of two integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funshampoo.core.contract import GradientTransformation
from funshampoo.distributed.collectives import ProcessGroup
from funshampoo.distributed.gathering import on_the_host, spreads


def group_of(transformations: Iterable[GradientTransformation]) -> ProcessGroup | None:
    """The process group of the first `sharded` in these, at any depth; None: all ranks, or none."""
    found = (spread.group for tx in transformations for spread in spreads(tx))
    return next(found, None)


class Joining:
    """A mixin that lets `Join` accept an optimizer, as it accepts ZeroRedundancyOptimizer.

    Its `step` calls `_sync_joined` first, but after a closure, whose collectives are the model's.
    """

    param_groups: list[dict[str, Any]]
    _join_config: Any = None  # `Join` sets it

    def _chains(self) -> list[GradientTransformation]:
        """The chains of all groups."""
        raise NotImplementedError

    def _step_groups(self, values: Mapping[str, Any]) -> None:
        """What `step` does, without a closure and without `_sync_joined`."""
        raise NotImplementedError

    def join_hook(self, **kwargs: Any) -> _Hook:
        """For `Join`: what a rank does once its data has ended."""
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """For `Join`: where the parameters are."""
        found: torch.device = self.param_groups[0]["params"][0].device
        return found

    @property
    def join_process_group(self) -> ProcessGroup:
        """For `Join`: the ranks that share the blocks; by default all."""
        return group_of(self._chains()) or dist.group.WORLD

    def _sync_joined(self, values: Mapping[str, Any]) -> None:
        """Make sure that ranks whose data has ended can take this step too.

        Args:
            values: the caller's own. Refused on a rank's first step, not when another has ended.

        Raises:
            RuntimeError: the optimizer is the first in the list given to `Join`; or there are
                values, which a rank without data does not have.
        """
        config = self._join_config
        if config is None or not config.enable:
            return
        if config.is_first_joinable:
            raise RuntimeError(
                "Join: the optimizer is the first in the list. Give the model first, as in "
                "Join([model, optimizer]): its collectives come before the optimizer's."
            )
        if values:
            name = next(iter(values))
            raise RuntimeError(
                f"Join: a rank whose data has ended steps without {name}=..., so no rank may pass "
                "it to step. Make it a number of the group, which that rank gets from the others: "
                "an argument of the recipe, set in param_groups before each step."
            )
        share(self.param_groups, self.join_process_group, self.join_device, live=True)


class _Hook:
    def __init__(self, optimizer: Joining) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """A step of a rank without data."""
        here = self._optimizer
        share(here.param_groups, here.join_process_group, here.join_device, live=False)
        with torch.no_grad():
            here._step_groups({})

    def post_hook(self, is_last_joiner: bool) -> None:
        """Called when all ranks have ended: steps are ordinary again."""
        self._optimizer._join_config = None


def share(
    groups: list[dict[str, Any]], group: ProcessGroup | None, device: torch.device, *, live: bool
) -> None:
    """Give the ranks without data the gradients and numbers of the first rank that has some.

    Gradients are replaced there, not overwritten. Every rank takes part.

    Args:
        groups: the optimizer's `param_groups`.
        live: whether this rank has data.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    flags = torch.tensor([rank if live else size, int(live)], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
    first, all_live = flags.tolist()
    if all_live:
        return
    source = first if group is None else dist.get_global_rank(group, first)
    parameters = [p for each in groups for p in each["params"]]
    mine = [_numbers(each) for each in groups], [p.grad is not None for p in parameters]
    box: list[Any] = [mine if rank == first else None]
    dist.broadcast_object_list(box, source, group=group)
    numbers, have = box[0]
    having = [p for p, has in zip(parameters, have) if has]
    gradients = _broadcast(having, source, group, sends=rank == first)
    if live:
        return
    for each, found in zip(groups, numbers):
        for name, x in found.items():
            own = each.get(name)
            if isinstance(own, Tensor) and isinstance(x, Tensor):
                own.detach().copy_(x)
            else:
                each[name] = x
    for p in parameters:
        p.grad = None
    for p, g in zip(having, gradients):
        p.grad = g


_NAMES = ("params", "param_names")


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, tuple, list, Tensor)
    numbers = {n: x for n, x in group.items() if isinstance(x, kinds) and n not in _NAMES}
    found: dict[str, Any] = on_the_host(numbers)
    return found


def _broadcast(
    parameters: list[Any], source: int, group: ProcessGroup | None, *, sends: bool
) -> list[Tensor]:
    """The parameters' gradients on rank `source`, one collective per dtype."""
    found: list[Any] = [None] * len(parameters)
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        places = [i for i, p in enumerate(parameters) if p.dtype == dtype]
        own = [parameters[i] for i in places]
        if sends:
            flat = torch.cat([p.grad.to(dtype).reshape(-1) for p in own])
        else:
            flat = torch.empty(sum(p.numel() for p in own), dtype=dtype, device=own[0].device)
        dist.broadcast(flat, source, group=group)
        for i, p, x in zip(places, own, torch.split(flat, [p.numel() for p in own])):
            found[i] = x.view(p.shape)
    return found
