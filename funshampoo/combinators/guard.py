"""Never poisoned: a gradient that is not finite changes nothing but a counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.failures import (
    FailureLimitError,
    failing_blocks,
    failure_limit_error,
    failure_report,
    limit_reached,
)
from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, look_due, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.modes import is_traced, unwrapped
from funshampoo.core.tree import (
    cast,
    check_parameters,
    compute_dtype,
    flatten,
    map_leaves,
    update_columns,
)
from funshampoo.linalg.norms import block_norm
from funshampoo.operators.columns import Column, add, multiply, product_in
from funshampoo.operators.leaf_ops import per_block
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import GuardedState

__all__ = [
    "FailureLimitError",
    "failing_blocks",
    "failure_limit_error",
    "failure_report",
    "guarded",
    "limit_reached",
    "surely_usable",
]


def guarded(
    inner: GradientTransformation, *, max_failures: int | None = 20, every: int = 10
) -> GradientTransformation:
    """Hold a block whose gradient is not finite: its update is zero, what it has averaged stays.

    Inside `blocked` every block is judged by itself; elsewhere all leaves are held together. A
    gradient G counts as not finite where ‖G‖² is NaN or above 2^-20 of the largest number of its
    dtype (in float32, ‖G‖ above about 1.8e16), so that sums of squares do not overflow in the
    statistics. Parameters are not looked at. What is held is counted in the state;
    `funshampoo.state.health` prints it. Counters of steps go on.

    Such a gradient enters as zeros, and the stages are told which rows count, `alive` in their
    context: a sum leaves the others as they are, and an average that has a weight of its own decays
    together with it. So their quotient stays as it was up to rounding, but weighs less against what
    comes, by the time that has passed; in its own memory, on every device alike. The state of a
    stage that does not know of `alive` is put back row by row, which takes a copy of it.

    Where the verdict can be read without waiting (a gradient on the CPU), a step without failures
    pays one pass over the gradient. Elsewhere (a GPU, torch.func, torch.compile) nothing waits.

    Args:
        inner: everything that is to be protected, so the whole chain inside `blocked`. Stages
            outside run on: a momentum there moves the parameters on a held step too.
        max_failures: this many failures in a row of one block, steps held or roots that the solver
            failed on, are an error; None never stops. The error comes at the beginning of a
            step, before anything is changed, so that the state is whole. Inside torch.compile
            there is none: look at `health`. Around ranks, `sharded` has this argument.
        every: steps between two looks at the counters, since looking waits for the device. They
            fall on multiples of it, as refreshes do.

    State: `GuardedState`.

    Raises:
        ValueError, TypeError: max_failures or every out of range.
        FailureLimitError: from update, at the first look after `max_failures` in a row.

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

    def init(
        params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> GuardedState:
        check_parameters(params, "guarded")

        def none_yet(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[:block_ndim], dtype=torch.int64)

        held, streak = map_leaves(none_yet, params), map_leaves(none_yet, params)
        counts = inner.counts or max_failures is not None
        state = inner.init(params, block_ndim=block_ndim, clock=clock or counts, **context)
        return GuardedState(held, streak, state, started(counts, clock))

    def check(state: GuardedState, context: Context) -> None:
        if max_failures is None or not look_due(state.steps, context, every):
            return
        if limit_reached(failure_report(state), max_failures):
            raise failure_limit_error(failing_blocks(state, max_failures), max_failures)

    def update(
        updates: Tree, state: GuardedState, params: Tree, context: Context
    ) -> tuple[Tree, GuardedState]:
        inside = running(state.steps, context)
        verdicts = _verdicts(updates, context)
        if verdicts is None:
            out, new = inner.run(updates, state.inner, params, inside)
            held = state.held
        else:
            dead, alive = verdicts
            safe = map_leaves(_zeroed, updates, dead)
            if context.gradient is updates:
                inside = changed(inside, gradient=safe)
            elif context.gradient is not None:
                inside = changed(inside, gradient=map_leaves(_zeroed, context.gradient, dead))
            out, new = _run(inner, safe, state.inner, params, changed(inside, alive=alive))
            out = map_leaves(_zeroed, out, dead)
            held = _added(state.held, dead, context.donate)
        streak = _streaks(updates, state.streak, verdicts and verdicts[0], context.donate)
        return out, GuardedState(held, streak, new, advanced(state.steps, context.donate))

    return GradientTransformation(
        init,
        update,
        inner.name,
        check=check,
        parts={"inner": inner},
        counts=inner.counts or max_failures is not None,
    )


def _run(
    inner: GradientTransformation, updates: Tree, state: Any, params: Tree, context: Context
) -> tuple[Tree, Any]:
    """Step `inner`; what would have spoiled a state that does not know of it is taken back."""
    if inner.minds_alive:
        return inner.run(updates, state, params, context)
    out, new = inner.run(updates, state, params, changed(context, donate=False))
    return out, _merged(new, state, context.alive, context.block_ndim)


def _added(counts: Tree, dead: Tree, donate: bool) -> Tree:
    """One more where the gradient was not finite."""

    def leaves(mask: Column, n: Column) -> tuple[Column, Column]:
        return mask, add(n, mask, donate)

    return update_columns(leaves, dead, (counts,))[1]


def _streaks(updates: Tree, streak: Tree, dead: Tree, donate: bool) -> Tree:
    """One more where the gradient was not finite, else 0; dead is None where all are."""

    def cleared(u: Column, n: Column) -> tuple[Column, Column]:
        return u, multiply(n, 0, donate)

    def judged(mask: Column, n: Column) -> tuple[Column, Column]:
        return mask, product_in(add(n, mask, donate), mask, donate)

    if dead is None:
        return update_columns(cleared, updates, (streak,))[1]
    return update_columns(judged, dead, (streak,))[1]


def _verdicts(updates: Tree, context: Context) -> tuple[Tree, Tree] | None:
    """Trees of (N,) or (): bool, whether a block can't be used, and 0 or 1, whether it can.

    None where there is no gradient. And None in the place of both: all can, as far as that can be
    read without waiting, and nobody around says otherwise. Outside block space all leaves share one
    verdict.
    """
    sources = [updates] if context.gradient is None else [updates, context.gradient]
    sources = sources[:1] if sources[0] is sources[-1] else sources
    given = context.alive
    if given is None and context.usable:
        return None
    if given is None and all([surely_usable(flatten(x)[0]) for x in sources]):
        return None
    norms = [_norms(x, updates, context.block_ndim) for x in sources]
    if given is None and all([_all_usable(flatten(x)[0]) for x in norms]):
        return None
    together = not context.block_ndim
    judged = [_judged(x, together) for x in norms] + ([] if given is None else [(None, given)])
    alive = judged[0][1]
    if len(judged) == 1:
        only: tuple[Tree, Tree] = judged[0]
        return only
    for _, other in judged[1:]:
        alive = map_leaves(_both, alive, other)
    dead: Tree = map_leaves(lambda x: None if x is None else x == 0, alive)
    return dead, alive


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a * b


def _judged(norms: Tree, together: bool) -> tuple[Tree, Tree]:
    """(can't be used, 1 where it can) of every norm; all at once, which is a few operators."""
    leaves, spec = flatten(norms)
    found: list[tuple[Tensor, Tensor] | tuple[None, None]] = [(None, None)] * len(leaves)
    kinds: dict[Any, list[int]] = {}
    for i, norm in enumerate(leaves):
        if norm is not None:
            kinds.setdefault((norm.dtype, norm.device), []).append(i)
    for (dtype, _), places in kinds.items():
        flat = torch.cat([leaves[i].reshape(-1) for i in places])
        dead = ~(flat * flat <= _limit(dtype))
        alive, sizes = (~dead).to(dtype), [leaves[i].numel() for i in places]
        for i, mask, fine in zip(places, torch.split(dead, sizes), torch.split(alive, sizes)):
            found[i] = mask.reshape(leaves[i].shape), fine.reshape(leaves[i].shape)
    if together and kinds:
        first = next(x[0] for x in found if x[0] is not None)
        masks = [x[0].to(first.device) for x in found if x[0] is not None]
        dead = torch.stack(masks).any()
        found = [
            (None, None) if x[1] is None else (dead.to(x[1].device), (~dead).to(x[1]))
            for x in found
        ]
    return tuple([spec.unflatten(column) for column in zip(*found)]) if leaves else (norms, norms)


def _norms(source: Tree, updates: Tree, block_ndim: int) -> Tree:
    """A tree of ‖G‖, (N,) or (). None where there is no gradient."""

    def norm(g: Tensor | None, u: Tensor | None) -> Tensor | None:
        if g is None or u is None:
            return None
        return block_norm(cast(g, compute_dtype(g)), block_ndim)

    return map_leaves(norm, source, updates)


def _usable(norm: Tensor) -> Tensor:
    return norm * norm <= _limit(norm.dtype)


def _limit(dtype: torch.dtype) -> float:
    """Of ‖G‖²."""
    return torch.finfo(dtype).max * 2.0**-20


def _all_usable(norms: Sequence[Tensor | None]) -> bool:
    """Whether all can be used, as far as that can be read without waiting for a device."""
    found = [unwrapped(norm) for norm in norms if norm is not None]
    return all([norm is not None and norm.is_cpu and bool(_usable(norm).all()) for norm in found])


def surely_usable(gradients: Sequence[Tensor | None]) -> bool | None:
    """Whether `guarded` holds none of these for sure; None where that can't be read now."""
    found = [g for g in gradients if g is not None]
    if is_traced() or not all([g.is_cpu and g.is_floating_point() for g in found]):
        return None
    # The norm of a whole leaf is that of its blocks at least.
    squares: dict[torch.dtype, list[Tensor]] = {}
    for g in found:
        flat = cast(g, compute_dtype(g)).reshape(-1)
        squares.setdefault(flat.dtype, []).append(torch.dot(flat, flat))
    return all([bool((torch.stack(x) <= _limit(dtype)).all()) for dtype, x in squares.items()])


def _zeroed(x: Tensor | None, dead: Tensor | None) -> Tensor | None:
    if x is None or dead is None:
        return x
    return x.masked_fill(per_block(dead, x), 0.0)


def _merged(new: Any, old: Any, alive: Tree, block_ndim: int) -> Any:
    """The new state where the gradient could be used, else the old; `steps` go on."""
    if not block_ndim:
        leaves = [f for f in flatten(alive)[0] if f is not None]

        def choose_all(place: Place, a: Tensor, b: Tensor) -> Tensor:
            counts_steps = place.path[-1:] == ("steps",)
            return a if counts_steps else torch.where(leaves[0].to(a.device) > 0, a, b)

        return map_tensors(choose_all, new, old) if leaves else new

    def choose(place: Place, a: Tensor, b: Tensor) -> Tensor:
        if a is b or place.stack is None or a.ndim == 0 or alive[place.stack] is None:
            return a
        return torch.where(per_block(alive[place.stack], a) > 0, a, b)

    return map_tensors(choose, new, old, stacks=alive.keys())
