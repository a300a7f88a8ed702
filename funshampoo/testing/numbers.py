"""Checks for every stage: missing gradients, saved states, narrow dtypes."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.applying import apply_updates
from funshampoo.core.contract import State, Tree
from funshampoo.core.tree import flatten, leaf_names, map_leaves
from funshampoo.state.checkpoint import load_state_dict, state_dict
from funshampoo.state.naming import named_tensors
from funshampoo.testing.trial import Trial, difference, named, not_finite


def none_leaves_alone(trial: Trial) -> None:
    """A gradient of None: no update, the leaf's state stays, and no other leaf changes."""
    leaves, spec = flatten(trial.params)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].numel())
    name = leaf_names(trial.params)[largest]

    def without(tree: Tree) -> Tree:
        return spec.unflatten([None if i == largest else x for i, x in enumerate(flatten(tree)[0])])

    state, params = trial.tx.init(trial.params), trial.params
    for t, g in enumerate(trial.grads):
        absent = t in (1, 2)
        old = _owned(state, name)
        updates, state = trial.step(without(g) if absent else g, state, params)
        if absent:
            if named(updates)[name] is not None:
                trial.fail(
                    f"the gradient of '{name}' was None, and its update is not",
                    "Go over the leaves by update_leaves of funshampoo.authoring, which leaves "
                    "such a one alone, or return None there.",
                )
            if seen := difference(_owned(state, name), old):
                trial.fail(
                    f"the gradient of '{name}' was None, and its state changed, {seen}",
                    "Go over the leaves by update_leaves of funshampoo.authoring, which leaves "
                    "the state of such a one alone.",
                )
        expected = without(trial.pure.updates[t])
        if seen := difference(without(updates), expected, trial.tolerance):
            trial.fail(
                f"a gradient of None for '{name}' changed the updates of other leaves, {seen}",
                "Treat every leaf by itself; for a stage whose leaves depend on each other by "
                "nature, pass none=False.",
            )
        params = apply_updates(params, updates)


def _owned(state: State, name: str) -> dict[str, Tensor]:
    """The tensors of a state that belong to one parameter, by their checkpoint names."""
    return {rest: x for owner, rest, x in named_tensors(state) if owner == name}


def resumes_from_a_pickle(trial: Trial) -> None:
    """torch.save of the state, torch.load, another instance: bitwise the same as without."""
    half = len(trial.grads) // 2
    state = _through_a_file(trial.pure.states[half], weights_only=False)
    _goes_on(trial, state, half, "torch.save and torch.load")


def resumes_from_a_checkpoint(trial: Trial) -> None:
    """funshampoo.state: every tensor has a name there, and is restored from it."""
    half = len(trial.grads) // 2
    saved = _through_a_file(state_dict(trial.pure.states[half]), weights_only=True)
    state = load_state_dict(trial.make().init(trial.params), saved).state
    if seen := difference(state, trial.pure.states[half]):
        trial.fail(
            f"a state that went through state_dict and load_state_dict is another one, {seen}",
            "Let init make every tensor of the state as it is later, in a named tuple whose fields "
            "are trees like the parameters or tensors.",
        )
    _goes_on(trial, state, half, "a checkpoint")


def _through_a_file(saved: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def _goes_on(trial: Trial, state: State, done: int, through: str) -> None:
    tx = trial.make()
    for t in range(done, len(trial.grads)):
        g, params = trial.grads[t], trial.pure.params[t]
        updates, state = tx.update(g, state, params, **trial.context)
        if seen := difference(updates, trial.pure.updates[t]):
            trial.fail(
                f"after {through} step {t + 1} gives other updates, {seen}",
                "Keep everything that is remembered in the state, as tensors: none of it in the "
                "transformation.",
            )


def half_precision_is_kept_in_float32(trial: Trial) -> None:
    """For bfloat16 or float16 parameters the state is float32 or wider, and updates are finite."""
    for dtype in (torch.bfloat16, torch.float16):
        states = _small_run(trial, [dtype])
        for name, x in named(states[-1]).items():
            if x.is_floating_point() and x.dtype.itemsize < 4:
                trial.fail(
                    f"'{name}' of the state is {x.dtype}, where the parameters are {dtype}",
                    "Averages lose most of what is added to them at such a precision: make it in "
                    "compute_dtype(p) of funshampoo.authoring, and cast the updates to it.",
                )


def dtypes_may_mix(trial: Trial) -> None:
    """One tree may have leaves in float32, bfloat16, float64 and float16."""
    _small_run(trial, [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32])


def parts_are_parts_of_the_whole(trial: Trial) -> None:
    """A stage declared elementwise gives the same on a part of each leaf: rows, columns."""
    if not trial.tx.elementwise:
        return
    whole = trial.still
    for axis, side in ((0, "first"), (-1, "last")):
        half = functools.partial(_half, axis=axis)
        part = functools.partial(_part, axis=axis)
        grads = [map_leaves(half, g) for g in trial.grads]
        run = trial.run(grads, map_leaves(half, trial.params), moves=False)
        results = zip(run.updates, whole.updates, run.states[1:], whole.states[1:])
        for t, (updates, expected, state, other) in enumerate(results, start=1):
            seen = difference(updates, map_leaves(half, expected), trial.tolerance)
            seen = seen or difference(state, map_leaves(part, state, other), trial.tolerance)
            if seen:
                trial.fail(
                    f"step {t} on half the {side} side of every leaf is not that half of the step: "
                    f"{seen}",
                    "The stage says elementwise=True, and gets a rank's parts of sharded "
                    "parameters by that: leave it out, or look at no entry but the own one.",
                )


def _half(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, (x.shape[axis] + 1) // 2).clone() if x.ndim else x


def _part(found: Tensor, whole: Tensor, axis: int) -> Tensor:
    """What `found` should be: a state may also have numbers per leaf, whatever its shape."""
    return whole if found.shape == whole.shape else _half(whole, axis)


def _small_run(trial: Trial, dtypes: Sequence[torch.dtype]) -> list[State]:
    """Three steps on leaves of these dtypes in turn."""

    def cast(tree: Tree) -> Any:
        turns = iter(range(len(flatten(tree)[0])))
        return map_leaves(lambda x: x.to(dtypes[next(turns) % len(dtypes)]), tree)

    params = cast(trial.params)
    run = trial.run([cast(g) for g in trial.grads[:3]], params)
    for t, updates in enumerate(run.updates, start=1):
        if name := not_finite(updates):
            trial.fail(
                f"the update of '{name}' in step {t} is not finite, at {_names(dtypes)}",
                "Compute in compute_dtype(u) of funshampoo.authoring: float16 ends at 65504, and a "
                "small epsilon is 0 there.",
            )
    return run.states


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join([str(dtype).removeprefix("torch.") for dtype in dtypes])
