"""Continue a run of torch.optim.AdamW: its moments become those of a chain."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.assembled import layout_of_spans
from funshampoo.core.modes import for_keeps
from funshampoo.core.text import plural
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.nodes import walk
from funshampoo.state.places import Place, block_of, map_tensors, spans_of
from funshampoo.state.stages import AdamState, BlockedState, EmaState, RmsState, ShardedState

_FIELDS: dict[tuple[Any, str], str] = {
    (AdamState, "first"): "exp_avg",
    (AdamState, "first_weight"): "weight",
    (AdamState, "second"): "exp_avg_sq",
    (AdamState, "second_weight"): "weight_sq",
    (EmaState, "average"): "exp_avg",
    (EmaState, "weight"): "weight",
    (RmsState, "second"): "exp_avg_sq",
}
"""Which moment a field holds; or the weight of one, 1 - beta1^t or 1 - beta2^t."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_Adam = dict[str, Any]  # AdamW's entries for one parameter, by the names above


@for_keeps()
def seed_from_adamw(state: Any, saved: Mapping[str, Any], names: Sequence[str]) -> Any:
    """A fresh state with the moments and the bias correction of a torch.optim.AdamW or Adam.

    It fills the fields that it finds: the second moment of `scale_by_adam` and `scale_by_rms`, and
    so that of the grafting in `shampoo`; the first moment of `ema` and `scale_by_adam`. Factor
    matrices start empty: the first step gets its direction from its own gradient, and its length
    from AdamW's second moment. Blocks that are stepped in eigenbases, as by `soap`, start from
    nothing, with a warning: AdamW's second moments are not in those coordinates, and its first
    would be divided by those of a single gradient.

    Args:
        state: tx.init(params), sharded or not, before any step. It is not written to.
        saved: optimizer.state_dict() of the AdamW.
        names: of the parameters, in the order in which AdamW had them, as leaves are named: [name
            for name, _ in model.named_parameters()].

    Raises:
        ValueError: another number of parameters, other shapes, amsgrad or no moments in `saved`, an
            impossible step count; a state with nothing to fill, or that has moments already, from
            steps or another seeding.
        TypeError: saved is not a state_dict.

    >>> import torch
    >>> from funshampoo import adamw
    >>> w = torch.ones(2, requires_grad=True)
    >>> old = torch.optim.AdamW([w], lr=0.1)
    >>> (3 * w).sum().backward()
    >>> old.step()
    >>> fresh = adamw(0.1).init({"w": w.detach()})
    >>> seed_from_adamw(fresh, old.state_dict(), ["w"])["scale_by_adam"].second["w"]
    tensor([0.0090, 0.0090])
    """
    adams = _read(saved, names)
    in_bases = _in_bases(state)
    filled: set[str] = set()
    own: list[str] = []

    def fill(place: Place, x: Tensor) -> Tensor:
        field = _FIELDS.get((place.kind, place.path[-1] if place.path else ""))
        if field is not None and _has_seen_gradients(x, field):
            own.append("/".join(map(str, place.path)))
        if field is None or id(x) in in_bases:
            return x
        new = x.clone()
        for parameter, block, target in _targets(place, new):
            if parameter not in adams:
                continue
            filled.add(parameter)
            moment = adams[parameter][field]
            if isinstance(moment, float):  # a weight of 1 means no correction
                target.copy_(torch.where(target == 1, target, moment))
                continue
            if place.kind is RmsState:  # it does no bias correction
                moment = moment / adams[parameter]["weight_sq"]
            part = moment if block is None else _cut(moment, block, place, parameter)
            if part is None or part.shape != target.shape:
                raise ValueError(
                    f"'{parameter}' has other shapes in the AdamW: are `names` in its order?"
                )
            target.copy_(part)
        return new

    seeded = map_tensors(fill, state)
    if not (filled or in_bases or _is_elsewhere(state, adams)):
        raise ValueError(
            "the state has no moments of these names to fill: no scale_by_adam, scale_by_rms or "
            "ema in it, or `names` are not those of its leaves."
        )
    if own:  # factor matrices, momentum and counters would stay, from other steps than the moments
        raise ValueError(
            f"the state has moments already ('{own[0]}'), of steps that were made with it, a "
            "checkpoint or another seeding. Seed a fresh one: tx.init(params), or the optimizer's "
            "after optimizer.state.clear()."
        )
    return seeded


def _has_seen_gradients(x: Tensor, field: str) -> bool:
    """Whether a moment, or the weight of one, differs from its initial value."""
    if field.startswith("weight"):  # 1, if nothing is corrected
        return bool(((x != 0) & (x != 1)).any())
    return bool((x != 0).any())


def _is_elsewhere(state: Any, adams: Collection[str]) -> bool:
    """Whether this is one rank's state, and other ranks may hold these parameters' moments."""
    nodes = [node for _, node in walk(state)]
    known = {name for x in nodes if isinstance(x, BlockedState) for name in x.layout}
    known |= {name for x in nodes if isinstance(x, ShardedState) for name in x.owned}
    shared = any(isinstance(x, ShardedState) and "0 of 1" not in x.ranks for x in nodes)
    kinds = tuple({kind for kind, _ in _FIELDS})
    return shared and not known.isdisjoint(adams) and any(isinstance(x, kinds) for x in nodes)


def _in_bases(state: Any) -> set[int]:
    """The ids of the tensors of all blocks that are stepped in eigenbases."""
    nodes = [node for _, node in walk(state)]
    spaces = [node for node in nodes if isinstance(node, BlockedState)] or [state]
    found = [[node for _, node in walk(space)] for space in spaces]
    stepped = [inside for inside in found if any(isinstance(x, EigenbasisState) for x in inside)]
    if stepped:
        warnings.warn(
            "what is stepped in eigenbases starts without AdamW's moments, which say nothing of "
            "its coordinates.",
            stacklevel=4,
        )
    return {id(x) for inside in stepped for x in inside if isinstance(x, Tensor)}


def check_saved(saved: Any) -> None:
    """Raise if this is not an optimizer's state_dict.

    Raises:
        TypeError: it is not.
    """
    wanted = {"state", "param_groups"}
    if not isinstance(saved, Mapping) or not saved.keys() >= wanted:
        raise TypeError(
            f"saved is {saved!r:.80}; give the state_dict() of a torch.optim.AdamW or Adam, which "
            "has 'state' and 'param_groups'."
        )


def _read(saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, _Adam]:
    """{parameter: AdamW's entries}, without parameters that have not been stepped yet."""
    check_saved(saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(indices) != len(names):
        raise ValueError(
            f"the AdamW has {plural(len(indices), 'parameter')}, `names` {len(names)}."
        )
    adams: dict[str, _Adam] = {}
    name_of = dict(zip(indices, names))
    for group in saved["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError("the AdamW uses amsgrad, whose maximum has no counterpart here.")
        for index in group["params"]:
            entry = saved["state"].get(index)
            if entry is None:
                continue
            wanted = {"step", "exp_avg", "exp_avg_sq"}
            if missing := sorted(wanted - entry.keys()) or sorted({"betas"} - group.keys()):
                raise ValueError(
                    f"what was saved of '{name_of[index]}' has no {', '.join(missing)}, but "
                    f"{sorted(map(str, entry)) or 'nothing'}: this is no state_dict of "
                    "torch.optim.AdamW or Adam."
                )
            if bases := sorted(entry.keys() & {"GG", "Q"}):  # beside moments in eigenbases
                raise ValueError(
                    f"what was saved of '{name_of[index]}' has {', '.join(bases)}: these are the "
                    "moments of a SOAP, which are not taken over. Start afresh."
                )
            step = _step_of(entry, name_of[index])
            first, second = (1 - beta**step for beta in _betas_of(group))
            moments = {key: entry[key] for key in _MOMENTS}
            adams[name_of[index]] = {**moments, "weight": first, "weight_sq": second}
    return adams


def _betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Raises ValueError unless they are a pair of numbers."""
    try:
        first, second = group["betas"]
        return float(first), float(second)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the AdamW's betas are {group['betas']!r:.80} and no pair of numbers: the checkpoint "
            "is damaged."
        ) from error


def _step_of(entry: Mapping[str, Any], name: str) -> float:
    """The number of steps that AdamW has made of a parameter.

    Raises:
        ValueError: a count that no run can have reached; or none yet, while the moments are not
            zero; or an entry of another type.
    """
    for key in _MOMENTS:
        if not isinstance(entry[key], Tensor):
            raise ValueError(
                f"{key} of '{name}' is {entry[key]!r:.80} and no tensor: the checkpoint is damaged."
            )
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        step = float("nan")  # refused like the others
    if not (step >= 0 and step.is_integer()):  # inf and NaN are not integers
        raise ValueError(
            f"the AdamW has made {entry['step']!r:.80} steps of '{name}': the checkpoint is "
            "damaged."
        )
    if step == 0 and any(bool((entry[key] != 0).any()) for key in _MOMENTS):
        raise ValueError(
            f"the AdamW has made no step of '{name}', but has moments of it: the checkpoint is "
            "damaged."
        )
    return step


def _targets(place: Place, x: Tensor) -> Iterator[tuple[str, tuple[int, ...] | None, Tensor]]:
    """(parameter, coordinates of its block, the part of x for it)."""
    if place.stack is None:
        yield ".".join(place.leaf), None, x
        return
    held = {row: i for i, row in enumerate(place.rows or ())}
    for parameter, stack, span in spans_of(place.layout):
        if stack == place.stack:
            for row, at in zip(range(span.first, span.last), span.coordinates()):
                if row in held:
                    yield parameter, at, x[held[row]] if x.ndim else x


def _cut(whole: Tensor, block: tuple[int, ...], place: Place, parameter: str) -> Tensor | None:
    """One block of a tensor of the parameter's shape; None if it has another number of entries.

    Args:
        block: its coordinates; all blocks before it have the size of the first.
    """
    try:
        where = layout_of_spans(place.layout[parameter], tuple(whole.shape))
    except ValueError:
        return None
    part = whole.reshape(where.merged)
    sizes = next(region.block for region in where.regions if region.stack == place.stack)
    for k, (i, first, size) in enumerate(zip(block, where.regions[0].block, sizes)):
        part = part.narrow(k, i * first, size)
    return part.reshape(block_of(str(place.stack)))
