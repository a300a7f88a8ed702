"""DTensors: parameters of which each rank has a part, as in FSDP2 and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from funshampoo.core.tree import flatten


def is_in_parts(x: Any) -> bool:
    """Whether this is a DTensor, of which a rank may have only a part."""
    kind = type(x)
    if kind is Tensor or kind is Parameter:
        return False
    if kind is not SEEN["kind"]:
        if not (hasattr(x, "device_mesh") and hasattr(x, "placements")):
            return False
        SEEN["kind"] = kind
    SEEN["any"] = True
    return True


SEEN: dict[str, Any] = {"any": False, "kind": None}
"""Whether this process has had a DTensor among its parameters; if not, checks are skipped. And the
class of the last one, which needs no further checks."""


def place_of(x: Any) -> Any:
    """(mesh, placements) of a DTensor, equal for two that are placed alike; None otherwise."""
    return (x.device_mesh, tuple(x.placements)) if is_in_parts(x) else None


def places_of(tensors: Iterable[Any]) -> list[Any]:
    """`place_of` of each."""
    kind = SEEN["kind"]  # here and below: needed for every leaf, so the common case makes no call
    return [(x.device_mesh, x.placements) if type(x) is kind else place_of(x) for x in tensors]


def any_in_parts(tensors: Iterable[Any]) -> bool:
    """Whether any of these is a DTensor. Runs for every leaf of a step, hence no call per leaf."""
    odd = [x for x in tensors if type(x) is not Tensor and type(x) is not Parameter]
    return len(odd) > 0 and any(map(is_in_parts, odd))


def are_alike(tensors: Iterable[Any]) -> bool:
    """Whether one operator can take all of these: no DTensors, or only DTensors of one mesh."""
    found = list(tensors)
    if not any_in_parts(found):
        return True
    meshes = [x.device_mesh if is_in_parts(x) else None for x in found]
    return all([mesh is meshes[0] or mesh == meshes[0] for mesh in meshes])


def parts_among(tensors: Iterable[Any]) -> list[Tensor]:
    """This rank's parts of the DTensors among these, in the same memory."""
    return local_parts(filter(is_in_parts, tensors)) if SEEN["any"] else []


def count_writes(tensors: Iterable[Any]) -> None:
    """Record a foreach operator's writes to these: for DTensors torch does not count them."""
    if SEEN["any"]:
        for x in tensors:
            if is_in_parts(x) and not x.is_inference():
                torch.autograd.graph.increment_version(x)


def local_part(x: Any) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    held: Tensor = x.to_local() if is_in_parts(x) else x
    return held


def local_parts(tensors: Iterable[Any]) -> list[Any]:
    """`local_part` of each, detached; other tensors stay as they are."""
    kind = SEEN["kind"]
    with torch.no_grad():  # while autograd records, to_local() takes thirty times as long
        found = [
            x if type(x) is Tensor else x.to_local() if type(x) is kind else local_part(x)
            for x in tensors
        ]
    odd = [x for x in found if type(x) is not Tensor and type(x) is not Parameter]
    # If a collective has yet to fill one, wait for it here.
    return [x.wait() if hasattr(x, "wait") else x for x in found] if odd else found


def placed_like(gradient: Any, parameter: Any) -> Any:
    """The gradient with the parameter's placements; a collective if it has others.

    Sequence parallelism produces partial sums, which are added up here.

    Raises:
        TypeError: only one of the two is a DTensor.
    """
    if gradient is None:
        return None
    is_placed = is_in_parts(gradient)
    if is_placed is not is_in_parts(parameter):
        kinds = ["a DTensor" if is_in_parts(x) else "a plain tensor" for x in (gradient, parameter)]
        raise TypeError(
            f"a gradient of shape {tuple(gradient.shape)} is {kinds[0]}, its parameter {kinds[1]}: "
            "give both as the model has them."
        )
    if not is_placed or tuple(gradient.placements) == tuple(parameter.placements):
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def all_placed_like(gradients: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    """`placed_like` of each."""
    kind = SEEN["kind"]
    return [
        g if type(g) is type(p) is kind and g.placements == p.placements else placed_like(g, p)
        for g, p in zip(gradients, parameters)
    ]


def parts_like(known: Iterable[Any], parts: Iterable[Tensor]) -> list[Any]:
    """Tensors placed like these, from this rank's parts; without communication.

    They are detached from autograd.

    Args:
        parts: as many numbers as this rank has of each, in any shape.
    """
    with torch.no_grad():
        return [
            _placed(x, part.view(x.to_local().shape)) if is_in_parts(x) else part.view(x.shape)
            for x, part in zip(known, parts)
        ]


def placed_again(before: Iterable[Any], own: Iterable[Any], after: Iterable[Any]) -> list[Any]:
    """A step's results on the parts, placed like its inputs; unchanged tensors stay the same.

    Args:
        own: this rank's parts of the inputs.
    """
    with torch.no_grad():  # runs for every leaf, so a call is made only where it is needed
        return [
            _placed(old, x.view(part.shape))
            if x is not part and x is not None and is_in_parts(old)
            else (old if x is part else x)
            for old, part, x in zip(before, own, after)
        ]


def detached(tensors: Iterable[Any]) -> list[Any]:
    """x.detach() of each; for DTensors without torch's dispatch."""
    with torch.no_grad():
        return [
            _placed(x, x.to_local().detach()) if is_in_parts(x) else x.detach() for x in tensors
        ]


def _placed(like: Any, part: Tensor) -> Any:
    spec = getattr(like, "_spec", None)
    if spec is not None and part.dtype == like.dtype:  # a tenth of the time of from_local
        return type(like)(part, spec, requires_grad=False)
    return type(like).from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def whole_numbers(numbers: Sequence[Any]) -> list[Tensor]:
    """Numbers, of shape (), as plain tensors, equal on all ranks: DTensors are assembled.

    One collective for all that are placed alike.
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
    """The gradients of sharded parameters, placed like these: partial sums are added up."""
    if params is None or not SEEN["any"]:
        return updates
    (leaves, spec), (known, other) = flatten(updates), flatten(params)
    if spec != other:  # left to the stages to report
        return updates
    placed = all_placed_like(leaves, known)
    if all([a is b for a, b in zip(placed, leaves)]):
        return updates
    return spec.unflatten(placed)
