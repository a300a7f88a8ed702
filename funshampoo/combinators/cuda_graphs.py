"""Steps as CUDA graphs: what a step launches is recorded once and replayed, without Python."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.compilation import phase_of
from funshampoo.combinators.recording import RECORDERS, Replay, watching
from funshampoo.core.applying import applied
from funshampoo.core.clock import running
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import (
    REFRESH,
    GradientTransformation,
    State,
    Tree,
    as_transformation,
)
from funshampoo.core.modes import in_a_mode, is_traced
from funshampoo.core.of_parts import steps_of
from funshampoo.core.placed import any_in_parts
from funshampoo.core.tree import flatten, leaf_names
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
            there is a `multi_steps` inside (which goes around `cuda_graphed`).

    >>> import torch
    >>> from funshampoo import sgd, update_in_place
    >>> tx = cuda_graphed(sgd(0.1))
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    inner = as_transformation(inner)
    unknown = inner.without_phase()
    if unknown:
        raise ValueError(
            f"cuda_graphed: '{unknown[0]}' may do other things on some steps than on others, and "
            "does not say on which: give its GradientTransformation a phase=, see docs/stages.md."
        )
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
        self._places: OrderedDict[Any, _Place] = OrderedDict()
        self._fixed: dict[str, Any] = {}  # numbers that stand in graphs
        self._moving: set[str] = set()  # the names of those that graphs read

    def step(self, updates: Tree, state: State, params: Tree, context: Context) -> State:
        """The state after it."""
        leaves = [p for p in flatten(params)[0] if isinstance(p, Tensor)]
        recorder = RECORDERS.get(leaves[0].device.type) if leaves else None
        if recorder is None or is_traced() or in_a_mode() or not _is_outermost(context):
            return applied(self._inner, updates, state, params, context)
        asked = _Asked(self._inner, updates, _on_device(state, leaves[0].device), params, context)
        self._note(context.hyper)
        place = self._place(asked, leaves)
        t = running(steps_of(state), context).step
        phase = phase_of(self._inner, t, context)
        key = phase, context.refresh, tuple(context.hyper)
        if phase is None or place.advances.get(key, ()) is None:
            return asked.as_it_is()
        place.set(asked, {name: x for name, x in context.hyper.items() if name in self._moving})
        if key not in place.replays:
            stand_in = place.steps.setdefault(phase, 1 if t is None else t)
            if key not in place.advances:  # it may never come again
                place.watch(key, asked.on_device(place, stand_in, asked.updates), asked)
                return asked.state
            replay = recorder(asked.on_device(place, stand_in, place.own_gradients(asked)))
            if replay is None:
                place.advances[key] = None
                return asked.as_it_is()
            place.replays[key] = replay
        place.replay(key, asked, leaves)
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

    def _place(self, asked: _Asked, leaves: list[Tensor]) -> _Place:
        """Where this step would be replayed, or could be."""
        kinds = [None if g is None else g.dtype for g in flatten(asked.updates)[0]]
        own = [0 if _may_count(x) else x.data_ptr() for x in asked.tensors]
        key = asked.layout, *kinds, *[p.data_ptr() for p in leaves], *own
        found = self._places.get(key)
        if found is None:
            _check_recordable(asked.state, leaves)
            found = self._places[key] = _Place(asked, leaves[0].device)
            if len(self._places) > PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(key)
        return found


class _Asked:
    """A step that is asked for."""

    def __init__(
        self,
        inner: GradientTransformation,
        updates: Tree,
        state: State,
        params: Tree,
        context: Context,
    ) -> None:
        self.inner, self.updates, self.state = inner, updates, state
        self.params, self.context = params, context
        self.held, self.layout = flatten(state)
        self.tensors = [x for x in self.held if isinstance(x, Tensor)]

    def as_it_is(self) -> State:
        """The state after it, in the memory of the one before, by which graphs know it."""
        after = applied(self.inner, self.updates, self.state, self.params, self.context)
        _put_back(self.held, flatten(after)[0])
        return self.state

    def on_device(self, place: _Place, step: int, gradients: Tree) -> Callable[[], None]:
        """The same, but that it reads what changes from step to step on the device."""
        hyper = {**self.context.hyper, **place.numbers}
        context = changed(self.context, step=step, hyper=hyper)
        held = place.on_counters(self.held)
        state = self.layout.unflatten(held)

        def run() -> None:
            after = applied(self.inner, gradients, state, self.params, context)
            _put_back(held, flatten(after)[0])

        return run


class _Place:
    """The graphs of one tree of parameters with its state, by what is asked of a step.

    Attributes:
        clocks: which leaves of the state are counters on the CPU.
        counters: what graphs read in their place.
        numbers: {name: ()}, float64: live numbers, likewise.
        gradients: likewise; None where there is none. () before there is a graph.
        advances: how much the clocks move. None: it can't be recorded.
        steps: one of each phase, which stands for all of them.
    """

    def __init__(self, asked: _Asked, device: torch.device) -> None:
        self.clocks = _clocks(asked, device)
        self.counters = [asked.held[i].to(device, copy=True) for i in self.clocks]
        self.numbers: dict[str, Tensor] = {}
        self.gradients: Sequence[Tensor | None] = ()
        self.advances: dict[Any, list[int] | None] = {}
        self.replays: dict[Any, Replay] = {}
        self.steps: dict[Any, int] = {}
        self._device = device

    def set(self, asked: _Asked, numbers: Mapping[str, Any]) -> None:
        """Say what changes from step to step, but for the gradients. Nobody waits."""
        for i, x in zip(self.clocks, self.counters):
            x.fill_(asked.held[i])
        for name, value in numbers.items():
            if name not in self.numbers:
                self.numbers[name] = torch.empty((), dtype=torch.float64, device=self._device)
            own = self.numbers[name]
            own.fill_(value) if _is_readable(value) else own.copy_(value)

    def on_counters(self, held: list[Any]) -> list[Any]:
        """The leaves of a state with counters that lie on the device."""
        found = list(held)
        for i, x in zip(self.clocks, self.counters):
            found[i] = x
        return found

    def own_gradients(self, asked: _Asked) -> Tree:
        """A tree of memory for gradients, which is the same at every call."""
        leaves, spec = flatten(asked.updates)
        if not self.gradients:
            self.gradients = [None if g is None else torch.empty_like(g) for g in leaves]
        return spec.unflatten(self.gradients)

    def watch(self, key: Any, run: Callable[[], None], asked: _Asked) -> None:
        """Make it as it would be recorded, and see whether it can be."""
        with watching() as waits:
            run()
        before = [int(asked.held[i]) for i in self.clocks]
        moved = [int(x) - n for x, n in zip(self.counters, before)]
        self._count(asked, moved)
        self.advances[key] = None if waits else moved
        if waits and not any([label.startswith(REFRESH) for label in key[0]]):
            warnings.warn(
                "cuda_graphed: plain steps wait for the GPU, so they can't be recorded, and run as "
                f"they are: see {waits[0]}.",
                stacklevel=2,
            )

    def replay(self, key: Any, asked: _Asked, leaves: list[Tensor]) -> None:
        """Make it."""
        given = [g for g in flatten(asked.updates)[0] if g is not None]
        if given:
            torch._foreach_copy_([x for x in self.gradients if x is not None], given)
        self.replays[key]()
        torch.autograd.graph.increment_version([*leaves, *asked.tensors])
        moved = self.advances[key]
        assert moved is not None, "it can't be recorded"
        self._count(asked, moved)

    def _count(self, asked: _Asked, moved: Sequence[int]) -> None:
        for i, n in zip(self.clocks, moved):
            asked.held[i].add_(n)


def _put_back(before: list[Any], after: list[Any]) -> None:
    """Have what a step has put in other memory where it was, since there a graph looks for it."""
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if isinstance(x, Tensor)]
    moved = [(x, y) for x, y in pairs if x is not y and x.data_ptr() != y.data_ptr()]
    if moved:
        own = {x.untyped_storage().data_ptr() for x, _ in pairs}
        kept = [y.clone() if y.untyped_storage().data_ptr() in own else y for _, y in moved]
        for (x, _), y in zip(moved, kept):
            x.copy_(y)


def _on_device(state: State, device: torch.device) -> State:
    """A state whose floating-point numbers all lie on the device, where graphs can change them."""
    leaves, layout = flatten(state)
    if all([not isinstance(x, Tensor) or x.device == device or _may_count(x) for x in leaves]):
        return state
    return layout.unflatten(
        [x.to(device) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    )


def _may_count(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.int64 and x.ndim == 0


def _clocks(asked: _Asked, device: torch.device) -> list[int]:
    """Which leaves of the state are clocks.

    Raises:
        ValueError: something else lies on the CPU.
    """
    names = [name.split(".")[-1].strip("'") for name in leaf_names(asked.state)]
    found = [
        i
        for i, x in enumerate(asked.held)
        if isinstance(x, Tensor) and _may_count(x) and names[i] == "steps"
    ]
    for i, x in enumerate(asked.held):
        if isinstance(x, Tensor) and x.device != device and i not in found:
            name = leaf_names(asked.state)[i]
            raise ValueError(
                f"cuda_graphed: '{name}' of the state lies on {x.device} and the parameters on "
                f"{device}: a graph can't count there. Leave out cuda_graphed."
            )
    return found


def _is_readable(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_cpu


def _is_outermost(context: Context) -> bool:
    """Whether no other chain is around it, and the caller gives nothing that a graph can't know."""
    inside = context.upstream or context.previous or context.rows or context.block_ndim
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
            "cuda_graphed: a graph can't read the counters of multi_steps; record what is inside, "
            "multi_steps(cuda_graphed(tx), every)."
        )
