"""Checks for every stage: pure functions, where donation only changes who owns the memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.core.applying import update_in_place
from funshampoo.core.tree import compute_dtype, flatten, leaf_names, map_leaves
from funshampoo.testing.trial import Snapshot, Trial, common_memory, difference, named

_NEVER_WRITE = (
    "Make a new tensor, as in torch.lerp(m, u, 1 - beta), and never write to an argument (m.mul_, "
    "m[i] = ..., out=m); only a donated state may be written to, by "
    "leaf_ops or columns of funshampoo.authoring."
)


def returns_pairs(trial: Trial) -> None:
    """init and update return (updates, state)."""
    state = trial.tx.init(trial.params)
    found = trial.tx.update(trial.grads[0], state, trial.params, **trial.context)
    if type(found) is not tuple or len(found) != 2:
        trial.fail(
            f"update returned a {type(found).__name__}",
            "Return a pair, (updates, state); a stage without a state returns the one that it was "
            "given, or is made by stateless(...).",
        )


def state_is_of_tensors(trial: Trial) -> None:
    """The state from update has no Python number or None; that from init is always checked."""
    first = trial.tx.init(trial.params)
    _, state = trial.step(trial.grads[0], first, trial.params)
    _check_structure(trial, 1, state, first)  # now: another step could not read it
    for name, x in named(state).items():
        if not isinstance(x, Tensor):
            trial.fail(
                f"the state that update returned holds {x!r} at '{name}'",
                "Checkpoints and vmap know tensors alone: make it one, torch.tensor(...), and "
                "write () for what is not there.",
            )


def arguments_are_untouched(trial: Trial) -> None:
    """Neither init nor update writes to them, by their values and torch's version counters."""
    before = Snapshot(parameters=trial.params)
    state, params = trial.tx.init(trial.params), trial.params
    if name := before.written():
        trial.fail(f"init wrote to {name}", _NEVER_WRITE)
    for g in trial.grads:
        before = Snapshot(gradients=g, state=state, parameters=params)
        _, state = trial.step(g, state, params)
        if name := before.written():
            trial.fail(f"update wrote to {name}", _NEVER_WRITE)


def twice_is_the_same(trial: Trial) -> None:
    """The same call gives the same result: nothing is stored outside the state."""
    run = trial.still
    remedy = (
        "Keep everything that is remembered in the state, and take random numbers from "
        "random_normal of funshampoo.authoring: no generator is one of a state's tensors."
    )
    if seen := difference(trial.tx.init(trial.params), run.states[0]):
        trial.fail(f"init called twice with the same parameters gave two states, {seen}", remedy)
    for t, g in enumerate(trial.grads):
        again = trial.step(g, run.states[t], trial.params)
        if seen := difference(again, (run.updates[t], run.states[t + 1])):
            trial.fail(
                f"update called twice with the same arguments gave two results, {seen}", remedy
            )


def steps_of_a_phase_are_alike(trial: Trial) -> None:
    """A step may be taken for another one of its phase, as in a graph of `compiled`."""
    run, first = trial.still, dict[Any, int]()
    for t, g in enumerate(trial.grads, start=1):
        other = first.setdefault(trial.tx.phase(t), t)
        if other == t or "step" in trial.context:
            continue
        found = trial.step(g, run.states[t - 1], trial.params, step=other)
        if seen := difference(found, (run.updates[t - 1], run.states[t])):
            trial.fail(
                f"step {t} is of the same phase as step {other}, and gives other results if it is "
                f"taken for that, {seen}",
                "Say on which steps something else happens, by phase= of GradientTransformation; "
                "for a Refreshing, phase=refreshing.schedule.phase().",
            )


def shapes_are_stable(trial: Trial) -> None:
    """The state keeps structure, shapes, dtypes and devices; updates have the parameters'."""
    first, *later = trial.still.states
    for t, (updates, state) in enumerate(zip(trial.still.updates, later), start=1):
        _check_structure(trial, t, state, first)
        for i, (a, b) in enumerate(zip(flatten(state)[0], flatten(first)[0])):
            if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                name = leaf_names(state)[i]
                trial.fail(
                    f"'{name}' of the state is {a.dtype} {tuple(a.shape)} on {a.device} after step "
                    f"{t}, and {b.dtype} {tuple(b.shape)} on {b.device} after init",
                    "Make it in init as it is going to be, and cast what is mixed into it.",
                )
        _check_updates(trial, t, updates, trial.params)


def _check_structure(trial: Trial, t: int, state: object, first: object) -> None:
    if flatten(state)[1] != flatten(first)[1]:
        trial.fail(
            f"the state of step {t} has another structure than that of init",
            "Return the same named tuple with the same keys on every step: what comes later "
            "begins as zeros, or is left out, as (), on all steps.",
        )


def _check_updates(trial: Trial, t: int, updates: object, params: object) -> None:
    if flatten(updates)[1] != flatten(params)[1]:
        trial.fail(
            f"the updates of step {t} are another tree than the gradients",
            "Build them by map_leaves or update_leaves of funshampoo.authoring.",
        )
    for (name, u), p in zip(named(updates).items(), flatten(params)[0]):
        if not isinstance(u, Tensor):
            trial.fail(f"the update of '{name}' is {u!r}", "Only a gradient of None has such one.")
        like_it = u.shape == p.shape and u.device == p.device
        if not like_it or u.dtype not in (p.dtype, compute_dtype(p)):
            trial.fail(
                f"the update of '{name}' is {u.dtype} {tuple(u.shape)} on {u.device}, its "
                f"parameter {p.dtype} {tuple(p.shape)} on {p.device}",
                "An update is added to its parameter: give it the gradient's shape and dtype.",
            )


def memory_is_apart(trial: Trial) -> None:
    """Updates and state, state and parameters, state and gradients share no memory."""
    run = trial.pure
    remedy = (
        "Clone what goes both ways: a donated step writes into the state, and a caller may write "
        "into the rest."
    )
    pairs = [("of init", run.states[0], "parameter", run.params[0])]
    for t, g in enumerate(trial.grads):
        when = f"of step {t + 1}"
        pairs += [
            (when, run.states[t + 1], "update of", run.updates[t]),
            (when, run.states[t + 1], "parameter", run.params[t]),
            (when, run.states[t + 1], "gradient of", g),
        ]
    for when, state, what, other in pairs:
        if common := common_memory(state, other):
            trial.fail(
                f"'{common[0]}' in the state {when} lies in the memory of the {what} '{common[1]}'",
                remedy,
            )


def donation_changes_no_number(trial: Trial) -> None:
    """donate=True gives the same bits, and writes only to the state."""
    before = Snapshot(gradients=trial.grads, parameters=trial.params)
    # The updates of all steps are compared at the end: no later step may overwrite them.
    donated = trial.run(donate=True)
    if name := before.written():
        trial.fail(
            f"a donated step wrote to {name}", "Only the state is donated: write to nothing else."
        )
    for t, (found, expected) in enumerate(zip(donated.updates, trial.pure.updates), start=1):
        if seen := difference(found, expected):
            trial.fail(
                f"the updates of step {t} with donate=True are others, {seen}",
                "Do the same operations in the same order either way, by "
                "leaf_ops of funshampoo.authoring, and let no update lie in the state's memory.",
            )
    if seen := difference(donated.states[-1], trial.pure.states[-1]):
        trial.fail(
            f"the state after steps with donate=True is another one, {seen}",
            "Do the same operations in the same order either way, and return what was written to.",
        )


def in_place_is_the_same(trial: Trial) -> None:
    """update_in_place gives the same as update with apply_updates."""
    mine = map_leaves(Tensor.clone, trial.params)
    state = trial.tx.init(mine)
    for t, g in enumerate(trial.grads):
        before = Snapshot(gradients=g)
        state = update_in_place(trial.tx, g, state, mine, **trial.context)
        if name := before.written():
            trial.fail(f"update_in_place wrote to {name}", _NEVER_WRITE)
        expected = trial.pure.params[t + 1], trial.pure.states[t + 1]
        if seen := difference((mine, state), expected):
            trial.fail(
                f"step {t + 1} by update_in_place gives other numbers, {seen}",
                "`apply` has to do what update with donate=True and W ← W + U do.",
            )
