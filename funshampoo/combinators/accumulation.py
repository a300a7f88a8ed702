"""Gradient accumulation over micro-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, new_counter, read_counter, running, slowed, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Phase, State, Tree, as_transformation
from funshampoo.core.of_parts import check_of_every
from funshampoo.core.parameters import check_parameters
from funshampoo.core.placed import whole_numbers
from funshampoo.core.traits import COUPLES, WAITS, with_traits
from funshampoo.core.tree import compute_dtype, flatten, map_leaves
from funshampoo.state.nodes import find_state
from funshampoo.state.places import is_shared
from funshampoo.state.stages import GuardedState, MultiStepsState


def multi_steps(inner: GradientTransformation, every: int) -> GradientTransformation:
    """Average the gradients of `every` calls, and run `inner` only on the last of them.

    On the other calls the updates are zeros, and `inner` and its state are not touched. A
    micro-gradient with a non-finite entry is left out of the average and counted in `skipped`. If
    all of a step's are, the step is left out too: the updates are zeros and every floating-point
    tensor of `inner`'s state stays as it was (its counters advance). Nothing waits for the device.
    What an enclosing `guarded` holds is left out, too. A micro-gradient that is None counts as
    zeros, since another may not be None for that parameter; if all are, `inner` sees None.

    Args:
        inner: any transformation; a whole `blocked`, not what is inside it.
        every: micro-batches per real step; 1 or more.

    Context: `step=`, if given, is the number of the micro-step from 1; `inner` sees the number of
    the real step. It is needed in torch.compile, as in `root_inverse`.

    State: `MultiStepsState`.

    Raises:
        ValueError: every < 1; from init, it is inside `blocked`.
        RuntimeError: inside torch.compile without `step=`.

    >>> from funshampoo import scale
    >>> tx = multi_steps(scale(-1.0), every=2)
    >>> state = tx.init({"w": torch.zeros(1)})
    >>> for g in (1.0, 3.0):
    ...     u, state = tx.update({"w": torch.tensor([g])}, state)
    ...     print(u["w"])
    tensor([0.])
    tensor([-2.])
    """
    inner = as_transformation(inner)
    check_count("every", every)

    def init(
        params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> MultiStepsState:
        check_parameters(params, "multi_steps")
        if block_ndim:
            raise ValueError(
                "multi_steps inside blocked would cut every micro-gradient into blocks, and can't "
                "tell which are None: put it around, multi_steps(blocked(...), every)."
            )
        leaves, _ = flatten(params)
        device = leaves[0].device if leaves else None
        return MultiStepsState(
            steps=started(True, clock),
            total=map_leaves(_zeros, params),
            seen=map_leaves(lambda _: new_counter(), params),
            used=torch.zeros((), dtype=torch.float32, device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            inner=inner.init(params, clock=True, **context),
        )

    def update(
        updates: Tree, state: MultiStepsState, params: Tree, context: Context
    ) -> tuple[Tree, MultiStepsState]:
        here = running(state.steps, context)
        t = here.step
        if t is None:
            raise RuntimeError(
                "multi_steps can't read its counter inside torch.compile: pass step= (from 1)."
            )
        new = _with_one_more(state, updates, context.alive)
        if t % every:
            return map_leaves(_zeros, new.total), new
        # `inner` may not consume its state: a step without any finite gradient falls back to it.
        # `alive` and `gradient` are those of the last micro-gradient: the mean contains only those
        # that are alive, and second moments are built from it.
        inside = changed(slowed(here, every), donate=False, alive=None, gradient=None)
        out, after = _real_step(inner, new, params, inside)
        return out, _emptied(new, after)

    def phase(step: int) -> Phase:
        return (f"real step of {every}", *inner.phase(step // every)) if step % every == 0 else ()

    found = GradientTransformation(
        init,
        update,
        phase=phase,
        check=check_of_every(inner, every),
        parts={"inner": inner},
        counts=True,
    )
    return with_traits(found, COUPLES, *[WAITS] * (every > 1))


def _with_one_more(state: MultiStepsState, updates: Tree, alive: Tree) -> MultiStepsState:
    """The state with these micro-gradients in it, except those that an enclosing guard holds."""
    finite = _all_finite(updates, like=state.used)
    for fine in () if alive is None else flatten(alive)[0]:
        finite = finite if fine is None else finite & (fine > 0).to(finite.device)
    return MultiStepsState(
        steps=advanced(state.steps, donate=False),
        total=map_leaves(lambda u, s: _add_if(finite, u, s), updates, state.total),
        seen=map_leaves(lambda u, n: n if u is None else n + 1, updates, state.seen),
        used=state.used + finite,
        skipped=state.skipped + ~finite,
        inner=state.inner,
    )


def _real_step(
    inner: GradientTransformation, state: MultiStepsState, params: Tree, context: Context
) -> tuple[Tree, State]:
    """(updates, state of `inner`) for the mean; zeros and the old state if none was finite."""
    some = state.used > 0
    guards = find_state(state.inner, GuardedState) is not None
    shared = guards and is_shared(state.inner)
    out, after = inner.run(_mean(state, some, shared), state.inner, params, context)
    if not shared:
        out = map_leaves(lambda u: u if u is None else _where(some, u, _zeros(u)), out)
        after = map_leaves(lambda a, b: _where(some, a, b), after, state.inner)
    return out, after


def _emptied(state: MultiStepsState, inner: State) -> MultiStepsState:
    """The state before the next micro-gradient."""
    total, seen = [map_leaves(torch.zeros_like, tree) for tree in (state.total, state.seen)]
    used = torch.zeros_like(state.used)
    return MultiStepsState(state.steps, total, seen, used, state.skipped, inner)


def _mean(state: MultiStepsState, some: Tensor, shared: bool) -> Tree:
    """The mean of the finite micro-gradients; None if all were None.

    If blocks are shared with other ranks, the owner of a block decides for all: NaN tells its guard
    that none was finite.
    """
    used = torch.where(some, state.used, math.nan) if shared else state.used.clamp(min=1)

    def mean(total: Tensor, seen: Tensor) -> Tensor | None:
        return None if read_counter(seen) == 0 else total / used.to(total)

    return map_leaves(mean, state.total, state.seen)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=compute_dtype(x))


def _all_finite(tree: Tree, like: Tensor) -> Tensor:
    """() bool on the device of `like`, without a sync."""
    leaves = [x for x in flatten(tree)[0] if x is not None]
    # Not all() of isfinite: torch 2.8 adds that up over the parts of a DTensor.
    flags = whole_numbers([(~torch.isfinite(x)).any() for x in leaves])
    if not flags:
        return torch.ones_like(like, dtype=torch.bool)
    return ~torch.stack([x.to(like.device) for x in flags]).any()


def _add_if(finite: Tensor, u: Tensor | None, total: Tensor) -> Tensor:
    if u is None:
        return total
    u = u.to(total.dtype)
    return total + torch.where(finite.to(u.device), u, torch.zeros_like(u))


def _where(some: Tensor, new: Any, old: Any) -> Any:
    """new where some, else old, for floating-point tensors; counters always advance."""
    if not isinstance(new, Tensor) or not new.is_floating_point():
        return new
    return torch.where(some.to(new.device), new, old)
