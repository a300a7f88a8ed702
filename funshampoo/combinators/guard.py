"""Never poisoned: a non-finite gradient changes nothing but a counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.failures import (
    failing_blocks,
    failure_limit_error,
    failure_report,
    limit_reached,
)
from funshampoo.combinators.spikes import no_spikes_yet
from funshampoo.combinators.verdicts import verdicts_on, with_spikes
from funshampoo.core.applying import add_in_place, applied, apply_of
from funshampoo.core.checks import check_count, check_flag, check_range
from funshampoo.core.clock import advanced, look_due, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Hyper, Tree, as_transformation
from funshampoo.core.live import number
from funshampoo.core.parameters import check_parameters
from funshampoo.core.traits import JUDGES
from funshampoo.core.tree import columns_of, flatten, is_one, update_columns
from funshampoo.operators.columns import Column, add, multiply, product_in, zeroed, zeros_a_block
from funshampoo.operators.joined import Joined
from funshampoo.operators.leaf_ops import per_block
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import GuardedState


def guarded(
    inner: GradientTransformation,
    *,
    max_failures: int | None = 20,
    every: int = 10,
    spike_factor: Hyper | None = None,
    by_leaf: bool = False,
) -> GradientTransformation:
    """Hold a block whose gradient is not finite: its update is zero, and its averages stay.

    With `spike_factor`, also one whose gradient is finite but far larger than its earlier ones.

    Inside `blocked` every block is judged separately; elsewhere all leaves are held together,
    unless `by_leaf`. A gradient G counts as non-finite if ‖G‖² is NaN or above 2^-20 of the largest
    number of its dtype (in float32, ‖G‖ above about 1.8e16), so that sums of squares do not
    overflow in the statistics. Parameters are not checked. Held blocks are counted in the state;
    `funshampoo.state.health` prints the counts. Step counters advance.

    Such a gradient enters as zeros, and `alive` in the context tells the stages which rows count: a
    sum leaves the others as they are, and an average with a weight of its own decays together with
    that weight. So their quotient stays the same up to rounding, but weighs less against later
    gradients, by the time that has passed. This happens in place, the same on every device. The
    state of a stage that does not know of `alive` is restored row by row, from a copy.

    If the verdict can be read without waiting (a gradient on the CPU), a step without failures
    costs one pass over the gradient. Elsewhere (a GPU, torch.func, torch.compile) nothing waits.

    Args:
        inner: everything to be protected, so the whole chain inside `blocked`. Stages outside keep
            running: a momentum there moves the parameters on a held step too.
        max_failures: this many failures in a row of one block, steps held or roots that the solver
            failed on, raise an error; None never does. It is raised at the beginning of a step,
            before anything is changed, so the state stays intact. Inside torch.compile there is
            none: check `health`. Across ranks, use the same argument of `sharded`.
        every: steps between two checks of the counters, since reading them waits for the device.
            Checks fall on multiples of it, as refreshes do.
        spike_factor: above 1: a gradient whose norm is more than this times the running average of
            its block's norms (outside `blocked`, its leaf's) is held and counted like a non-finite
            one; `health` says how many of those held were spikes. None, the default: an outlier
            enters, and a second moment that has seen it shortens the block's steps accordingly for
            as long as it remembers: after a gradient 1e3, 1e6 times too large, `shampoo(...)` needs
            800 and 2,200 steps to get back to half its former step, `adamw(...)` 5,700 and 19,500.
            10 to 100 leaves ordinary noise alone. The first 10 gradients of a block are never
            judged, and an outlier among them raises the average for some hundred steps. After 10
            held spikes the scale has changed: the next gradient is accepted, and the average
            restarts from it; see `combinators.spikes`. It costs a pass over the gradient, and
            nothing waits for a device.
        by_leaf: outside `blocked`, hold each leaf separately. For an elementwise `inner`; under
            `sharded` the result is then bitwise that of one process, whatever is held.

    State: `GuardedState`.

    Raises:
        ValueError, TypeError: max_failures, every, spike_factor or by_leaf out of range; by_leaf
            around a stage that does not know of `alive`.
        FailureLimitError: from update, at the first check after `max_failures` in a row.

    Reference: Optax, `apply_if_finite`.

    >>> import torch
    >>> from funshampoo import blocked, trace
    >>> tx = blocked(guarded(trace(0.9)), max_size=2)
    >>> state = tx.init({"w": torch.zeros(4)})
    >>> g = {"w": torch.tensor([1.0, 2.0, float("nan"), 3.0])}
    >>> updates, state = tx.update(g, state)
    >>> updates["w"], state.inner.held["2"]
    (tensor([1., 2., 0., 0.]), tensor([0, 1]))
    """
    inner = as_transformation(inner)
    if max_failures is not None:
        check_count("max_failures", max_failures)
    check_count("every", every)
    if spike_factor is not None:
        check_range("spike_factor", spike_factor, 1.0, low_open=True, infinite=True)
    _check_by_leaf(by_leaf, inner)
    counts, spiky = inner.counts or max_failures is not None, spike_factor is not None

    def init(
        params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> GuardedState:
        check_parameters(params, "guarded")
        held, streak = [zeros_a_block(params, block_ndim, torch.int64) for _ in range(2)]
        state = inner.init(params, block_ndim=block_ndim, clock=clock or counts, **context)
        spikes = no_spikes_yet(params, block_ndim) if spiky else ()
        return GuardedState(held, streak, state, started(counts, clock), spikes)

    def check(state: GuardedState, context: Context) -> None:
        if max_failures is None or not look_due(state.steps, context, every):
            return
        if limit_reached(failure_report(state), max_failures):
            raise failure_limit_error(failing_blocks(state, max_failures), max_failures)

    def update(
        updates: Tree,
        state: GuardedState,
        params: Tree,
        context: Context,
        *,
        in_place: bool = False,
    ) -> tuple[Tree, GuardedState]:
        verdicts, spikes = verdicts_on(updates, context, by_leaf), state.spikes
        if spike_factor is not None:
            factor = number(spike_factor, context.hyper)
            verdicts, spikes = with_spikes(verdicts, updates, spikes, factor, context, by_leaf)
        step = updates, state.inner, params, running(state.steps, context)
        if verdicts is not None:  # some of the updates have to be zeros
            out, own = _run_judged(inner, *step, *verdicts)
            if in_place:
                add_in_place(params, out)
        else:
            out, own = (None, applied(inner, *step)) if in_place else inner.run(*step)
        return out, _stepped(updates, state, own, verdicts and verdicts[0], spikes, context)

    found = GradientTransformation(
        init,
        update,
        inner.name,
        apply=apply_of(update),
        check=check,
        parts={"inner": inner},
        counts=counts,
        numbers=[spike_factor],
    )
    if not by_leaf:
        found.traits = {**found.traits, JUDGES: "guarded"}  # it has the name of `inner`
    return found


def _run_judged(
    inner: GradientTransformation,
    updates: Tree,
    state: Any,
    params: Tree,
    context: Context,
    dead: Tree,
    alive: Tree,
) -> tuple[Tree, Any]:
    """The step of `inner` with the gradients that can be used; zeros for the others."""
    safe = _zeroed(updates, dead)
    gradient = safe if is_one(context.gradient, updates) else _zeroed(context.gradient, dead)
    inside = changed(context, gradient=gradient, alive=alive)
    out, new = run_alive(inner, safe, state, params, inside)
    return _zeroed(out, dead), new


def _stepped(
    updates: Tree, state: GuardedState, own: Any, dead: Tree, spikes: Any, context: Context
) -> GuardedState:
    """The state after a step; `own` is the new state of `inner`, dead is None if all are fine."""
    donate = context.donate

    def cleared(u: Column, streak: Column) -> tuple[Column, Column]:
        return u, multiply(streak, 0, donate)

    def counted(more: Column, held: Column, streak: Column) -> tuple[Column, Column, Column]:
        longer = add(streak, more, donate)
        return more, add(held, more, donate), product_in(longer, more, donate)

    if dead is None:
        held = state.held
        _, streak = update_columns(cleared, updates, (state.streak,))
    else:
        _, held, streak = update_columns(counted, _as_counts(dead), (state.held, state.streak))
    return GuardedState(held, streak, own, advanced(state.steps, donate), spikes)


def _check_by_leaf(by_leaf: bool, inner: GradientTransformation) -> None:
    check_flag("by_leaf", by_leaf)
    if by_leaf and not inner.minds_alive:
        raise ValueError(
            "by_leaf needs stages that know of `alive`: let each declare it (see docs/stages.md), "
            "or leave by_leaf out, and all leaves are held together."
        )


def run_alive(
    inner: GradientTransformation, updates: Tree, state: Any, params: Tree, context: Context
) -> tuple[Tree, Any]:
    """Step `inner`; if it does not know of `alive`, restore its state where that is 0."""
    if inner.minds_alive or context.alive is None:
        return inner.run(updates, state, params, context)
    out, new = inner.run(updates, state, params, changed(context, donate=False))
    return out, _merged(new, state, context.alive, context.block_ndim)


def _as_counts(dead: Tree) -> Tree:
    """The masks as int64 numbers, like the counters: mixed dtypes take a launch for every pair."""
    joined = Joined(dead)
    return joined.split({kind: x.to(torch.int64) for kind, x in joined.join(dead).items()})


def _zeroed(tree: Tree, dead: Tree) -> Tree:
    """The tree with zeros where its leaf, or block, is dead. Leaves without a verdict stay."""
    if tree is None:
        return None
    leaves, spec = flatten(tree)
    masks = columns_of([dead], spec, tree)[0]
    judged = [i for i, x in enumerate(leaves) if x is not None and masks[i] is not None]
    found = zeroed([leaves[i] for i in judged], [masks[i] for i in judged])
    for i, x in zip(judged, found):
        leaves[i] = x
    return spec.unflatten(leaves)


def _merged(new: Any, old: Any, alive: Tree, block_ndim: int) -> Any:
    """The new state where the gradient could be used, else the old; a clock always advances."""
    one = next((fine for fine in flatten(alive)[0] if fine is not None), None)  # outside of blocks

    def choose(place: Place, a: Tensor, b: Tensor) -> Tensor:
        fine = one
        if block_ndim:  # where a block's own `steps` are held with it
            fine = None if place.stack is None or a.ndim == 0 else alive[place.stack]
        elif place.path[-1:] == ("steps",):
            return a
        if a is b or fine is None:
            return a
        return torch.where(per_block(fine.to(a.device), a) > 0, a, b)

    return map_tensors(choose, new, old, stacks=alive.keys() if block_ndim else None)
