"""Recording a step: where it reads what, whether it can be recorded, and the recording itself."""

from __future__ import annotations

import contextlib
import operator
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.applying import applied
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import REFRESH, GradientTransformation, State, Tree
from funshampoo.core.interrupted import tensors_of
from funshampoo.core.modes import for_a_recording, for_keeps, lie_apart
from funshampoo.core.tree import flatten, leaf_names, map_leaves

Replay: TypeAlias = Callable[[], Any]

_DTYPE, _KIND = operator.attrgetter("dtype"), operator.attrgetter("dtype", "shape")


class StepRequest:
    """A requested step.

    Attributes:
        gradients, leaves, tensors: the tensors of the updates, the parameters, the state.
    """

    def __init__(
        self,
        inner: GradientTransformation,
        updates: Tree,
        state: State,
        params: Tree,
        context: Context,
        leaves: list[Tensor],
    ) -> None:
        self.inner, self.updates, self.params, self.context = inner, updates, params, context
        self.gradients, self.leaves = flatten(updates)[0], leaves
        self.take(state)

    def take(self, state: State) -> None:
        """Use another state, with the same values."""
        self.state, self.tensors = state, tensors_of(state)
        self._where: tuple[Any, ...] = ()

    def where(self) -> tuple[Any, ...]:
        """The dtypes, shapes, strides and addresses that a graph would be bound to."""
        if not self._where:
            given = [None if g is None else g.dtype for g in self.gradients]
            held = *self.leaves, *self.tensors
            # An address alone is not enough: a tensor of another kind may lie there later. Of the
            # state numbers and strides, since its many shapes take three times as long.
            kinds = *map(_KIND, self.leaves), *map(_DTYPE, self.tensors)
            sizes = *map(Tensor.numel, self.tensors), *map(Tensor.stride, held)
            self._where = (*given, *kinds, *sizes, *map(Tensor.data_ptr, held))
        return self._where

    def as_it_is(self) -> State:
        """Step without a graph; returns the new state, in the old one's memory if it fits there."""
        before = flatten(self.state)[0]
        after = applied(self.inner, self.updates, self.state, self.params, self.context)
        return self.state if put_back(before, flatten(after)[0]) else after

    def on_device(self, graphs: Graphs, step: int, gradients: Tree) -> Callable[[], State | None]:
        """The step as a function that reads what changes from step to step on the device.

        It returns the new state; None if that is in the memory of the old one.
        """
        known = {n: x for n, x in graphs.numbers.items() if n in self.context.hyper}
        hyper = {**self.context.hyper, **known}
        clock = None if self.context.clock is None else graphs.clock
        context = changed(self.context, step=step, hyper=hyper, clock=clock)
        leaves, layout = flatten(self.state)
        counters = {id(self.tensors[i]): x for i, x in zip(graphs.clocks, graphs.counters)}
        held = [counters.get(id(x), x) for x in leaves]
        state = layout.unflatten(held)

        def run() -> State | None:
            with for_a_recording():
                after = applied(self.inner, gradients, state, self.params, context)
            return None if put_back(held, flatten(after)[0]) else after

        return run


class Graphs:
    """The graphs for one tree of parameters with its state, by kind of step.

    Attributes:
        clocks: indices of the state's tensors that are counters on the CPU.
        counters: their copies on the device, which graphs read.
        clock: such a copy of an enclosing transformation's clock.
        numbers: {name: tensor}, float64: such copies of live numbers.
        gradients: such copies; None for a missing gradient. () before there is a graph.
        advances: {kind of step: how much the clocks move}. None: it can't be recorded.
        steps: one step number of each phase, which stands for all of them.
    """

    def __init__(self, request: StepRequest) -> None:
        self._device = request.leaves[0].device
        self.clocks = _clocks(request, self._device)
        with for_keeps():
            self.counters = [request.tensors[i].to(self._device, copy=True) for i in self.clocks]
            self.clock = torch.zeros((), dtype=torch.int64, device=self._device)
        self.numbers: dict[str, Tensor] = {}
        self.gradients: Sequence[Tensor | None] = ()
        self.advances: dict[Any, list[int] | None] = {}
        self.replays: dict[Any, Replay] = {}
        self.steps: dict[Any, int] = {}
        self._waited: set[Any] = set()
        self._apart = lie_apart(request.tensors)

    def set(self, request: StepRequest, numbers: Mapping[str, Any]) -> None:
        """Write what changes from step to step, except gradients, to the device; nothing waits."""
        for i, x in zip(self.clocks, self.counters):
            x.fill_(request.tensors[i])
        if request.context.clock is not None:
            self.clock.fill_(request.context.clock)
        for name, value in numbers.items():
            shape = value.shape if isinstance(value, Tensor) else ()
            own = self.numbers.get(name)
            if own is None or own.shape != shape:
                with for_keeps():
                    own = torch.empty(shape, dtype=torch.float64, device=self._device)
                self.numbers[name] = own
                self.replays.clear()  # they would keep reading the old one
            if isinstance(value, Tensor) and (value.ndim or not value.is_cpu):
                own.copy_(value, non_blocking=True)
            else:
                own.fill_(value)

    def own_gradients(self, request: StepRequest) -> Tree:
        """A tree of tensors for copies of the gradients, the same at every call."""
        if not self.gradients:
            with for_keeps():
                known = request.gradients
                self.gradients = [None if g is None else torch.empty_like(g) for g in known]
        return flatten(request.updates)[1].unflatten(self.gradients)

    def watch(self, key: Any, run: Callable[[], State | None], request: StepRequest) -> State:
        """Run a step as it would be recorded, and see whether it can be; returns the new state.

        A step that waits is watched once more: constants move to the device when first used.
        """
        with watching() as waits:
            after = run()
        before = [int(request.tensors[i]) for i in self.clocks]
        moved = [int(x) - n for x, n in zip(self.counters, before)]
        self._count(request, moved)
        if after is not None or not self._apart:  # another kind of state, or parts overlap
            self.advances[key] = None
        elif not waits:
            self.advances[key] = moved
        elif key not in self._waited:
            self._waited.add(key)
        else:
            self.advances[key] = None
            if not any([label.startswith(REFRESH) for label in key[0]]):
                warnings.warn(
                    "cuda_graphed: plain steps wait for the GPU, so they can't be recorded, and "
                    f"run as they are: see {waits[0]}.",
                    stacklevel=2,
                )
        return request.state if after is None else self._on_clocks(after, request)

    def _on_clocks(self, state: State, request: StepRequest) -> State:
        """A state with its counters on the CPU again."""
        clocks = {id(x): request.tensors[i] for i, x in zip(self.clocks, self.counters)}
        return map_leaves(lambda x: clocks.get(id(x), x), state)

    def replay(self, key: Any, request: StepRequest) -> None:
        """Make the step by replaying its graph."""
        given = [g for g in request.gradients if g is not None]
        if given:
            torch._foreach_copy_([x for x in self.gradients if x is not None], given)
        self.replays[key]()
        written = [x for x in (*request.leaves, *request.tensors) if not x.is_inference()]
        torch.autograd.graph.increment_version(written)
        moved = self.advances[key]
        assert moved is not None, "it can't be recorded"
        self._count(request, moved)

    def _count(self, request: StepRequest, moved: Sequence[int]) -> None:
        for i, n in zip(self.clocks, moved):
            request.tensors[i].add_(n)


def put_back(before: list[Any], after: list[Any]) -> bool:
    """Copy what a step has put into other memory back to its old address, where graphs look for it.

    Returns:
        Whether that was possible: if the tensors have the same number, shapes and dtypes as before.
    """
    kinds = [
        [(x.shape, x.dtype) if isinstance(x, Tensor) else () for x in s] for s in (before, after)
    ]
    if kinds[0] != kinds[1]:
        return False
    pairs = [(x, y) for x, y in zip(before, after) if isinstance(x, Tensor)]
    moved = [(x, y) for x, y in pairs if x is not y and x.data_ptr() != y.data_ptr()]
    if moved and not lie_apart([x for x, _ in pairs]):
        return False
    own = {x.untyped_storage().data_ptr() for x, _ in pairs}
    kept = [y.clone() if y.untyped_storage().data_ptr() in own else y for _, y in moved]
    for (x, _), y in zip(moved, kept):
        x.copy_(y)
    return True


def on_device(state: State, device: torch.device) -> State:
    """The state with all floating-point numbers on the device, where graphs can change them."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and x.is_floating_point() else x

    return map_leaves(moved, state)


def _clocks(request: StepRequest, device: torch.device) -> list[int]:
    """Which tensors of the state are clocks.

    Raises:
        ValueError: something else lies on the CPU.
    """
    leaves = flatten(request.state)[0]
    names = {id(x): name for x, name in zip(leaves, leaf_names(request.state))}
    found = []
    for i, x in enumerate(request.tensors):
        name = names[id(x)]
        may_count = x.is_cpu and x.dtype == torch.int64 and x.ndim == 0
        if may_count and name.split(".")[-1].strip("'") == "steps":
            found.append(i)
        elif x.device != device:
            raise ValueError(
                f"cuda_graphed: '{name}' of the state lies on {x.device} and the parameters on "
                f"{device}: a graph can't count there. Leave out cuda_graphed."
            )
    return found


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Yields a list which, after the block, says where in it something waited for the GPU."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _recorded(run: Callable[[], Any], device: torch.device) -> Replay | None:
    """Record what `run` launches as a CUDA graph, without executing it; None if it can't be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            others = _GRAPHS[device, torch.cuda.current_stream().cuda_stream]
            # A pool is freed with its last graph, and its handle is invalid from then on.
            pool = next((other.pool() for other in others), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
            others.add(graph)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        warnings.warn(
            "cuda_graphed: a step could not be recorded, and runs as it is from now on: "
            f"{str(error).splitlines()[0]}",
            stacklevel=2,
        )
        return None
    return graph.replay


_GRAPHS: defaultdict[Any, weakref.WeakSet[Any]] = defaultdict(weakref.WeakSet)
"""A stream's graphs, in one memory pool: none leaves anything there that it or others need."""

RECORDERS: dict[str, Callable[[Callable[[], Any], torch.device], Replay | None]] = {
    "cuda": _recorded
}
"""{type of device: recorder}"""
