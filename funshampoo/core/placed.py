"""DTensors: parameters of which a rank has a part, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from funshampoo.core.tree import flatten


def is_in_parts(x: Any) -> bool:
    """Whether this is a DTensor, of which a rank may have a part only."""
    if type(x) is Tensor or type(x) is Parameter:
        return False
    found = hasattr(x, "device_mesh") and hasattr(x, "placements")
    SEEN["any"] = SEEN["any"] or found
    return found


SEEN = {"any": False}
"""Whether this process has had a DTensor among its parameters; if not, nobody has to look."""


def place_of(x: Any) -> Any:
    """(mesh, placements) of a DTensor, which two that lie alike share; None of anything else."""
    return (x.device_mesh, tuple(x.placements)) if is_in_parts(x) else None


def any_in_parts(tensors: Iterable[Any]) -> bool:
    """Whether there is a DTensor among these. Asked for every leaf of a step, so without a call."""
    odd = [x for x in tensors if type(x) is not Tensor and type(x) is not Parameter]
    return bool(odd) and any(map(is_in_parts, odd))


def are_alike(tensors: Iterable[Any]) -> bool:
    """Whether one operator takes all of these: no DTensors, or nothing but those of one mesh."""
    meshes = [x.device_mesh if is_in_parts(x) else None for x in tensors]
    return all([mesh == meshes[0] for mesh in meshes])


def parts_among(tensors: Iterable[Any]) -> list[Tensor]:
    """What this rank has of the DTensors among these, in the same memory."""
    return [x.to_local() for x in tensors if is_in_parts(x)] if SEEN["any"] else []


def count_writes(tensors: Iterable[Any]) -> None:
    """Say that a foreach operator has written to these: of DTensors torch counts no such write."""
    if SEEN["any"]:
        for x in tensors:
            if is_in_parts(x) and not x.is_inference():
                torch.autograd.graph.increment_version(x)


def local_part(x: Any) -> Tensor:
    """What this rank has of a tensor, in the same memory."""
    held: Tensor = x.to_local() if is_in_parts(x) else x
    return held


def placed_like(gradient: Any, parameter: Any) -> Any:
    """The gradient, with the parameter's placements; a collective where it has others.

    Sequence parallelism gives partial sums, which are added up here.

    Raises:
        TypeError: one of the two is a DTensor, the other is not.
    """
    if gradient is None or not (is_in_parts(gradient) or is_in_parts(parameter)):
        return gradient
    if not (is_in_parts(gradient) and is_in_parts(parameter)):
        kinds = ["a DTensor" if is_in_parts(x) else "a plain tensor" for x in (gradient, parameter)]
        raise TypeError(
            f"a gradient of shape {tuple(gradient.shape)} is {kinds[0]}, its parameter {kinds[1]}: "
            "give both as the model has them."
        )
    if tuple(gradient.placements) == tuple(parameter.placements):
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def part_like(parameter: Any, part: Tensor) -> Any:
    """A tensor placed as the parameter is, of which this rank has `part`; without communication.

    Args:
        part: as many numbers as this rank has of the parameter, in any shape.
    """
    if not is_in_parts(parameter):
        return part.view(parameter.shape)
    return type(parameter).from_local(
        part.view(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole_numbers(numbers: Sequence[Any]) -> list[Tensor]:
    """Numbers, (), as plain tensors, equal on all ranks: DTensors are put together.

    One collective for those that are placed alike.
    """
    found = list(numbers)
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(found):
        if is_in_parts(x):
            kinds.setdefault((place_of(x), x.dtype), []).append(i)
    for ((mesh, placements), _), places in kinds.items():
        mine = torch.stack([found[i].to_local() for i in places])
        together = type(found[places[0]]).from_local(mine, mesh, placements, run_check=False)
        for i, x in zip(places, together.full_tensor().unbind(0)):
            found[i] = x
    return found


def placed_as(updates: Any, params: Any) -> Any:
    """The gradients of sharded parameters, placed as these are: partial sums are added up."""
    if params is None or not SEEN["any"]:
        return updates
    (leaves, spec), (known, other) = flatten(updates), flatten(params)
    if spec != other:  # which is for the stages to say
        return updates
    return spec.unflatten(list(map(placed_like, leaves, known)))
