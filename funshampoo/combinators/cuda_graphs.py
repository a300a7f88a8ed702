"""Steps as CUDA graphs: a step's launches are recorded once and replayed, without Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.compilation import check_phases, init_checked, phase_of
from funshampoo.combinators.recording import RECORDERS, Graphs, StepRequest, on_device
from funshampoo.core.applying import applied
from funshampoo.core.clock import running
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.live import numbers_among
from funshampoo.core.modes import is_traced
from funshampoo.core.of_parts import steps_of
from funshampoo.core.placed import any_in_parts
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import MultiStepsState, ShardedState

MOST_TREES = 8
"""Trees of parameters whose graphs are kept: a transformation may step several in turn."""


def cuda_graphed(inner: GradientTransformation) -> GradientTransformation:
    """The same transformation, with its steps in place recorded as CUDA graphs and replayed.

    A step of a few hundred launches takes the host longer than the GPU: see docs/gpu.md. Replayed,
    it is one launch, which runs the same kernels on the same numbers. So is a step with a refresh,
    if its rules don't wait for the GPU, as Newton-Schulz and Cholesky QR don't.

    Every phase of the schedule (`GradientTransformation.phase`: a plain step, a refresh, every k-th
    step) has its own graph. At its first occurrence the step runs without one and is watched; if it
    does not wait for the GPU, the second is recorded. What changes from step to step lives on the
    GPU, where the graph reads it: the gradients, which are copied, the counter, and those live
    numbers, `hyper`, that have changed before. A number that changes for the first time, and
    parameters or a state in other memory, make new graphs.

    A step runs without a graph on any device but CUDA; outside `update_in_place`, which the
    optimizer calls; if the caller passes values under names of its own; under torch.func and
    torch.compile; and inside another chain. Put `in_tf32` on either side.

    Args:
        inner: a whole chain. Every host-side choice of a stage has to follow from `phase`. A step's
            temporaries stay reserved, shared by all graphs of a stream, and so does a copy of the
            gradients for each tree of parameters.

    State: of `inner`. Its floating-point numbers on the CPU move to the GPU.

    Raises:
        ValueError: a stage in it needs the number of the step and has no `phase` (names it); from a
            step, its blocks are `sharded`, parameters are DTensors or on several devices, there
            is a `multi_steps` inside (around it steps are pure, and run without graphs), or a
            number is a tensor on another device. Steps without a graph, as on a CPU, don't raise.

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
        init_checked(inner, "cuda_graphed"),
        lambda updates, state, params, context: inner.run(updates, state, params, context),
        inner.name,
        apply=_Graphed(inner).step,
        parts={"inner": inner},
        state_of=lambda state, name: state,
        casts=inner.casts,
    )


class _Graphed:
    """A step in place: without a graph, watched, recorded or replayed."""

    def __init__(self, inner: GradientTransformation) -> None:
        self._inner = inner
        self._graphs: OrderedDict[Any, Graphs] = OrderedDict()
        self._fixed: dict[str, Any] = {}  # numbers baked into graphs
        self._moving: set[str] = set()  # names of the numbers that graphs read from the device

    def __deepcopy__(self, memo: Any) -> _Graphed:
        """Without its graphs, which are bound to the memory that they were recorded on."""
        return _Graphed(self._inner)

    def step(self, updates: Tree, state: State, params: Tree, context: Context) -> State:
        """Make the step; returns the new state."""
        leaves = [p for p in flatten(params)[0] if isinstance(p, Tensor)]
        recorder = RECORDERS.get(leaves[0].device.type) if leaves else None
        if recorder is None or is_traced() or _is_seen() or not _is_outermost(context):
            return applied(self._inner, updates, state, params, context)
        self._note(context.hyper)
        request = StepRequest(self._inner, updates, state, params, context, leaves)
        graphs = self._graphs_for(request)
        t = running(steps_of(request.state), context).step
        phase = phase_of(self._inner, t, context)
        key = phase, context.refresh, tuple(context.hyper), context.clock is None
        if phase is None or graphs.advances.get(key, ()) is None:  # it can't be recorded
            return request.as_it_is()
        graphs.set(request, {name: x for name, x in context.hyper.items() if name in self._moving})
        if key not in graphs.replays:
            stand_in = graphs.steps.setdefault(key[:2], 1 if t is None else t)
            if key not in graphs.advances:  # it may never recur
                return graphs.watch(key, request.on_device(graphs, stand_in, updates), request)
            run = request.on_device(graphs, stand_in, graphs.own_gradients(request))
            replay = recorder(run, leaves[0].device)
            if replay is None:
                graphs.advances[key] = None
                return request.as_it_is()
            graphs.replays[key] = replay
        graphs.replay(key, request)
        return request.state

    def _note(self, hyper: Mapping[str, Any]) -> None:
        """From now on, new graphs read the numbers that have changed."""
        others = {
            name
            for name, value in hyper.items()
            if name not in self._moving
            and (isinstance(value, Tensor) or self._fixed.setdefault(name, value) != value)
        }
        if others:
            self._moving |= others
            self._graphs.clear()

    def _graphs_for(self, request: StepRequest) -> Graphs:
        """The graphs for the memory that this step works in; there may be none yet."""
        found = self._graphs.get(request.where())
        if found is None:
            _check_recordable(self._inner, request.state, request.leaves)
            request.take(on_device(request.state, request.leaves[0].device))
            found = self._graphs[request.where()] = Graphs(request)
            if len(self._graphs) > MOST_TREES:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(request.where())
        return found


def _is_seen() -> bool:
    """Whether a mode sees the operators here; that of a default device sees only functions."""
    return bool(torch._C._len_torch_dispatch_stack())


def _is_outermost(context: Context) -> bool:
    """Whether no other chain is around it, and the caller passes nothing that a graph can't know.

    An enclosing clock, as that of `partition`, is allowed.
    """
    inside = context.upstream or context.later or context.rows or context.block_ndim
    judged = context.gradient is not None or context.alive is not None
    return not (inside or judged or context.extra)


def _check_recordable(inner: GradientTransformation, state: State, leaves: list[Tensor]) -> None:
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
    if name := _with_a_tensor_elsewhere(inner, leaves[0].device):
        raise ValueError(
            f"cuda_graphed: a number of '{name}' is a tensor that does not lie on "
            f"{leaves[0].device}: a graph would go on with the value that it has now. Give a "
            "float, or a tensor on that device, which is read on every step."
        )


def _with_a_tensor_elsewhere(tx: GradientTransformation, device: torch.device) -> str:
    """The name of a stage with a number that is a tensor on another device; "" for none."""
    for x in numbers_among(tx.numbers):
        if isinstance(x, Tensor) and x.device != device:
            return tx.name
    return next(filter(None, [_with_a_tensor_elsewhere(p, device) for p in tx.parts.values()]), "")
