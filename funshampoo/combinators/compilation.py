"""Steps as graphs of torch.compile, one for every phase of the schedule."""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.verdicts import surely_usable
from funshampoo.core.applying import applied
from funshampoo.core.clock import running
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import (
    REFRESH,
    THREADS,
    GradientTransformation,
    Phase,
    State,
    Tree,
    as_transformation,
)
from funshampoo.core.live import Numbers
from funshampoo.core.modes import full_precision, is_traced, product_precision
from funshampoo.core.of_parts import steps_of
from funshampoo.core.traits import IN_TF32
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import find_state, walk
from funshampoo.state.stages import MultiStepsState, RefreshedState, ShardedState

FOR_ALL = "refresh for all"  # when the caller passes refresh=True


def compiled(inner: GradientTransformation, **options: Any) -> GradientTransformation:
    """The same transformation, with its steps compiled by torch.compile.

    A step becomes one graph, which fuses everything elementwise between two products into one pass
    over memory, without Python in between. Every phase of the schedule
    (`GradientTransformation.phase`: a plain step, a refresh, every k-th step) has its own graph,
    compiled when the phase first occurs, which takes from seconds to a minute, and again for other
    shapes. On a CPU, refreshes by eigendecomposition are left to their threads; on a GPU, refreshes
    of all blocks run uncompiled. Results differ from those of `inner` by rounding.

    A step also runs uncompiled if a gradient is None or is not finite (as far as that can be read
    without waiting, on a CPU; elsewhere `guarded` decides in the graph), if the caller passes
    numbers under names of its own (pass tensors), and under torch.func and torch.compile. Live
    numbers, `hyper`, make no new graph.

    Args:
        inner: a whole chain. With `stagger` every step of the interval has its own graph.
        options: of torch.compile, such as backend or mode; by default fullgraph is True and dynamic
            False.

    Context: `step=` or `refresh=` say whether cached values are recomputed, as in `root_inverse`.

    State: of `inner`.

    Raises:
        ValueError: a stage in it needs the number of the step and has no `phase` (names it); from
            init, it refreshes values and has none; from update, its blocks are `sharded`, or there
            is a `multi_steps` inside (which goes around `compiled`).

    >>> import torch
    >>> from funshampoo import sgd, update_in_place
    >>> tx = compiled(sgd(0.1), backend="eager")
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    inner = as_transformation(inner)
    check_phases(inner, "compiled")
    if IN_TF32 in inner.traits:
        raise ValueError(
            "compiled: in_tf32 does nothing in a graph; put it outside, in_tf32(compiled(tx))."
        )

    def in_place(updates: Tree, state: State, params: Tree, context: Context) -> State:
        return applied(inner, updates, state, params, context)

    update, apply = _ByGraph(inner, inner.run, options), _ByGraph(inner, in_place, options)
    return GradientTransformation(
        init_checked(inner, "compiled"),
        lambda updates, state, params, context: update(updates, state, params, context),
        inner.name,
        apply=lambda updates, state, params, context: apply(updates, state, params, context),
        parts={"inner": inner},
        state_of=lambda state, name: state,
    )


class _ByGraph:
    """A step that runs as a graph wherever it can, with one graph per phase of the schedule."""

    def __init__(
        self, inner: GradientTransformation, step: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        self._inner, self._step, self._options = inner, step, options
        self._graphs: dict[Phase, Callable[..., Any]] = {}
        self._steps: dict[Any, int] = {}  # one of each phase, which stands for all of them
        self._checked = False

    def __call__(self, updates: Tree, state: State, params: Tree, context: Context) -> Any:
        if is_traced():
            return self._step(updates, state, params, context)
        if not self._checked:
            _check_compilable(state)
            self._checked = True
        gradients, _ = flatten(updates)
        t = running(steps_of(state), context).step
        phase = phase_of(self._inner, t, context)
        usable = surely_usable(gradients)
        if (
            phase is None
            or _is_left(phase, gradients)
            or _has_numbers(context.extra)
            or usable is False
            or any([g is None for g in gradients])
        ):
            return self._step(updates, state, params, context)
        plain = changed(
            context,
            step=self._steps.setdefault((phase, context.refresh), 1 if t is None else t),
            hyper=_as_tensors(context.hyper),
            entered=None,  # its tensors would be a graph's inputs
            usable=bool(usable),
        )
        if phase not in self._graphs:
            self._graphs[phase] = _compiled(self._step, self._options)
        # A graph can't set the precision: its kernels use the setting that they find.
        rare = any([label.startswith(REFRESH) for label in phase])
        try:
            with full_precision() if rare else product_precision():
                return self._graphs[phase](updates, state, params, plain)
        except torch._dynamo.exc.TorchDynamoException:
            # If the caller made a mistake, this raises the error that the tracer has hidden.
            self._inner.run(updates, state, params, changed(context, donate=False))
            raise


def check_phases(inner: GradientTransformation, word: str) -> None:
    """Raise for a stage that needs the number of the step and does not declare its phases.

    Raises:
        ValueError: names the stage.
    """
    unknown = inner.without_phase()
    if unknown:
        raise ValueError(
            f"{word}: '{unknown[0]}' may do other things on some steps than on others, and does "
            "not say on which: give its GradientTransformation a phase=, see docs/stages.md."
        )


def init_checked(inner: GradientTransformation, word: str) -> Callable[..., State]:
    """The init, which raises for a stage that refreshes values and does not declare when.

    A graph would do on all steps what the first one did.

    Raises:
        ValueError: names the stage.
    """

    def init(params: Tree, **context: Any) -> State:
        state = inner.init(params, **context)
        if stage := _refreshes_untold(inner, state):
            raise ValueError(
                f"{word}: '{stage}' refreshes values, and does not say on which steps: give its "
                "GradientTransformation phase=refreshing.schedule.phase(), see docs/stages.md."
            )
        return state

    return init


def _refreshes_untold(transformation: GradientTransformation, state: State) -> str:
    """The name of a stage with refreshed values of its own and without a phase, or ""."""
    states = {}
    for name in transformation.parts:
        try:
            states[name] = transformation.state_of(state, name)
        except (AttributeError, KeyError, TypeError):  # it keeps none, as sharded(whole=False)
            states[name] = state
    for name, part in transformation.parts.items():
        if found := _refreshes_untold(part, states[name]):
            return found
    own = _refreshed(state) - sum([_refreshed(inside) for inside in states.values()])
    return transformation.name if own > 0 and transformation._phase is None else ""


def _refreshed(state: State) -> int:
    return sum([isinstance(node, RefreshedState) for _, node in walk(state)])


def phase_of(inner: GradientTransformation, t: int | None, context: Context) -> Phase | None:
    """What happens on step t but not on every step; None if that can't be known."""
    if not inner.counts or not _has_phases(inner):
        return ()
    if t is None:
        return None
    if context.refresh is None:
        return inner.phase(t)
    others = [label for label in inner.phase(t) if not label.startswith(REFRESH)]
    return (*others, FOR_ALL) if context.refresh else tuple(others)


def _has_phases(transformation: GradientTransformation) -> bool:
    """Whether steps differ in kind; a schedule alone, whose clock may be anywhere, has no phase."""
    parts = transformation.parts.values()
    return transformation._phase is not None or any(map(_has_phases, parts))


def _is_left(phase: Phase, gradients: Sequence[Any]) -> bool:
    """Whether a step is a refresh that a graph would only delay.

    On a CPU, threads share the eigendecompositions. On a GPU a refresh of all blocks is thousands
    of long-running operators, whose graph takes minutes to compile.
    """
    if all([g is None or g.is_cpu for g in gradients]):
        return any([label.startswith(THREADS) for label in phase])
    return any([label in (REFRESH, THREADS, FOR_ALL) for label in phase])


def _as_tensors(hyper: Numbers) -> dict[str, Tensor]:
    """Numbers as tensors; else they are part of a graph's code, and new values make a new graph."""
    return {
        name: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")
        for name, x in hyper.items()
    }


def _has_numbers(extra: Mapping[str, Any]) -> bool:
    """Whether the caller's own values include numbers, which would be part of a graph's code."""
    return any([type(value) in (int, float) for value in extra.values()])


def _check_compilable(state: State) -> None:
    if find_state(state, ShardedState) is not None:
        raise ValueError("compiled: a graph can't wait for other ranks; leave out sharded.")
    if find_state(state, MultiStepsState) is not None:
        raise ValueError(
            "compiled: a graph can't read the counters of multi_steps; compile what is inside, "
            "multi_steps(compiled(tx), every)."
        )


def _compiled(step: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """torch.compile of a step, as a function with a code object of its own.

    Dynamo counts graphs by code object: all chains of a process would share its limit of eight.
    """

    def run(updates: Tree, state: State, params: Tree, context: Context) -> Any:
        return step(updates, state, params, context)

    assert isinstance(run, types.FunctionType)
    code, scope = run.__code__.replace(), run.__globals__
    own = types.FunctionType(code, scope, run.__name__, None, run.__closure__)
    if options.get("backend", "inductor") == "inductor":
        _import_what_warns()
    compile_: Callable[..., Any] = torch.compile
    found: Callable[..., Any] = compile_(own, **{"fullgraph": True, "dynamic": False} | options)
    return found


def _import_what_warns() -> None:
    """Import what inductor does, without torch's warning of its own code: with -W error it dies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is", DeprecationWarning)
        importlib.import_module("torch.utils.mkldnn")
