"""Steps as CUDA graphs: what a step launches is recorded once and replayed, without Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.compilation import check_phases, phase_of
from funshampoo.combinators.recording import RECORDERS, Asked, Place, on_device
from funshampoo.core.applying import applied
from funshampoo.core.clock import running
from funshampoo.core.context import Context
from funshampoo.core.contract import (
    GradientTransformation,
    State,
    Tree,
    as_transformation,
)
from funshampoo.core.modes import is_traced
from funshampoo.core.of_parts import steps_of
from funshampoo.core.placed import any_in_parts
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import MultiStepsState, ShardedState

PLACES = 8
"""Trees of parameters whose graphs are kept: a transformation may step several in turn."""


def cuda_graphed(inner: GradientTransformation) -> GradientTransformation:
    """The same transformation, its steps in place recorded as CUDA graphs and replayed.

    A step of a few hundred launches takes a host longer than the GPU: see docs/gpu.md. Replayed
    it is one launch, in which the same kernels run on the same numbers. So is a step with a
    refresh, if its rules don't wait for the GPU, as Newton-Schulz and Cholesky QR don't.

    Every phase of the schedule (`GradientTransformation.phase`: a plain step, a refresh, every k-th
    step) has a graph of its own. When it first comes the step runs as it is, and is watched; if
    it has not waited for the GPU, the second is recorded. What changes from step to step lies on
    the GPU where the graph reads it: the gradients, which are copied, the counter, and those live
    numbers, `hyper`, that have changed before; one that changes for the first time, and parameters
    or a state in other memory, make new graphs.

    A step runs as it is on another device than CUDA; outside of `update_in_place`, which the
    optimizer calls; where the caller passes values under names of its own; under torch.func and
    torch.compile; and inside of another chain. Put `in_tf32` on either side.

    Args:
        inner: a whole chain. Every host-side choice of a stage has to follow from `phase`. What a
            step makes on the way stays reserved, for all graphs of a process together, and
            gradients once more for each tree of parameters.

    State: of `inner`. What is a floating-point number on the CPU in it moves to the GPU.

    Raises:
        ValueError: a stage in it wants the number of the step and has no `phase` (names it); from
            a step, its blocks are `sharded`, parameters are DTensors or on several devices, or
            there is a `multi_steps` inside. (Around it steps are pure, and run as they are.)

    >>> import torch
    >>> from funshampoo import sgd, update_in_place
    >>> tx = cuda_graphed(sgd(0.1))
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    inner = as_transformation(inner)
    check_phases(inner, "cuda_graphed")
    return GradientTransformation(
        inner.init,
        lambda updates, state, params, context: inner.run(updates, state, params, context),
        inner.name,
        apply=_Graphed(inner).step,
        parts={"inner": inner},
        state_of=lambda state, name: state,
        casts=inner.casts,
    )


class _Graphed:
    """A step in place: as it is, watched, recorded or replayed."""

    def __init__(self, inner: GradientTransformation) -> None:
        self._inner = inner
        self._places: OrderedDict[Any, Place] = OrderedDict()
        self._fixed: dict[str, Any] = {}  # numbers that stand in graphs
        self._moving: set[str] = set()  # the names of those that graphs read

    def __deepcopy__(self, memo: Any) -> _Graphed:
        """Without its graphs, which belong to the memory that they were recorded on."""
        return _Graphed(self._inner)

    def step(self, updates: Tree, state: State, params: Tree, context: Context) -> State:
        """The state after it."""
        leaves = [p for p in flatten(params)[0] if isinstance(p, Tensor)]
        recorder = RECORDERS.get(leaves[0].device.type) if leaves else None
        if recorder is None or is_traced() or _is_seen() or not _is_outermost(context):
            return applied(self._inner, updates, state, params, context)
        self._note(context.hyper)
        asked = Asked(self._inner, updates, state, params, context, leaves)
        place = self._place(asked)
        t = running(steps_of(asked.state), context).step
        phase = phase_of(self._inner, t, context)
        key = phase, context.refresh, tuple(context.hyper), context.clock is None
        if phase is None or place.advances.get(key, ()) is None:
            return asked.as_it_is()
        place.set(asked, {name: x for name, x in context.hyper.items() if name in self._moving})
        if key not in place.replays:
            stand_in = place.steps.setdefault(key[:2], 1 if t is None else t)
            if key not in place.advances:  # it may never come again
                return place.watch(key, asked.on_device(place, stand_in, updates), asked)
            run = asked.on_device(place, stand_in, place.own_gradients(asked))
            replay = recorder(run, leaves[0].device)
            if replay is None:
                place.advances[key] = None
                return asked.as_it_is()
            place.replays[key] = replay
        place.replay(key, asked)
        return asked.state

    def _note(self, hyper: Mapping[str, Any]) -> None:
        """A number that has changed is read from now on, by graphs that are made anew."""
        others = {
            name
            for name, value in hyper.items()
            if name not in self._moving
            and (isinstance(value, Tensor) or self._fixed.setdefault(name, value) != value)
        }
        if others:
            self._moving |= others
            self._places.clear()

    def _place(self, asked: Asked) -> Place:
        """Where this step would be replayed, or could be."""
        found = self._places.get(asked.where())
        if found is None:
            _check_recordable(asked.state, asked.leaves)
            asked.take(on_device(asked.state, asked.leaves[0].device))
            found = self._places[asked.where()] = Place(asked)
            if len(self._places) > PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(asked.where())
        return found


def _is_seen() -> bool:
    """Whether a mode looks at what is done here; one of a default device sees functions alone."""
    return bool(torch._C._len_torch_dispatch_stack())


def _is_outermost(context: Context) -> bool:
    """Whether no other chain is around it, and the caller gives nothing that a graph can't know.

    A clock may be around, as that of `partition`.
    """
    inside = context.upstream or context.later or context.rows or context.block_ndim
    judged = context.gradient is not None or context.alive is not None
    return not (inside or judged or context.extra)


def _check_recordable(state: State, leaves: list[Tensor]) -> None:
    remedy = "Leave out cuda_graphed."
    if any([p.device != leaves[0].device for p in leaves]):
        raise ValueError(f"cuda_graphed: parameters lie on several devices. {remedy}")
    if find_state(state, ShardedState) is not None or any_in_parts(leaves):
        raise ValueError(f"cuda_graphed: a graph can't wait for other ranks. {remedy}")
    if find_state(state, MultiStepsState) is not None:
        raise ValueError(
            "cuda_graphed: a graph can't read the counters of multi_steps, and its steps are pure. "
            "Add gradients up before the step, as in p.grad, or leave out cuda_graphed."
        )
