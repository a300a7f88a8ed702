"""Which gradients can be used: those that are finite and, if requested, not spikes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.spikes import above, any_held, held, learned
from funshampoo.core.context import Context
from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.modes import is_traced, unwrapped
from funshampoo.core.placed import any_in_parts
from funshampoo.core.tree import flatten, map_leaves, wide
from funshampoo.linalg.norms import block_norms
from funshampoo.operators.columns import in_compute_dtype
from funshampoo.operators.joined import Joined
from funshampoo.state.stages import SpikeState

Verdicts = tuple[Tree, Tree]
"""Trees of (N,) or (): bool, whether a block can't be used, and 0 or 1, whether it can."""


def verdicts_on(updates: Tree, context: Context, by_leaf: bool = False) -> Verdicts | None:
    """Which gradients can't be used because of their values.

    A leaf without a gradient has None. None in place of the pair: all can be used, as can be read
    without waiting, and no enclosing guard says otherwise. Outside block space all leaves share one
    verdict, unless each is judged `by_leaf`.
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
    together = not (context.block_ndim or by_leaf)
    dead, alive = _judged(norms[0], together)
    others = [_judged(x, together)[1] for x in norms[1:]] + ([] if given is None else [given])
    if others:
        for other in others:
            alive = map_leaves(_both, alive, other)
        dead = map_leaves(lambda x: None if x is None else x == 0, alive)
    return dead, alive


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a * b


def _judged(norms: Tree, together: bool) -> Verdicts:
    """(can't be used, 1 where it can) for every norm; joined, so that it is a few operators."""
    joined = Joined(norms)
    flat = joined.join(norms)
    dead = {kind: ~(x * x <= _LIMITS[x.dtype]) for kind, x in flat.items()}
    found = joined.split(dead), joined.split(_alive(dead, flat))
    return _all_as_the_worst(found) if together else found


def _alive(dead: Tree, norms: Tree) -> Tree:
    """1 where a block can be used, from masks of where it can't; in the dtypes of the norms."""
    return map_leaves(lambda x, n: None if x is None else (~x).to(n.dtype), dead, norms)


def _all_as_the_worst(found: Verdicts) -> Verdicts:
    """One verdict for all, a pair of tensors for each dtype and device."""
    (masks, spec), (alive, _) = map(flatten, found)
    known = [x for x in masks if x is not None]
    if not known:
        return found
    dead = torch.stack([x.to(known[0].device) for x in known]).any()
    shared: dict[Any, tuple[Tensor, Tensor]] = {}
    for fine in alive:
        if fine is not None and (fine.dtype, fine.device) not in shared:
            shared[fine.dtype, fine.device] = dead.to(fine.device), (~dead).to(fine)
    pairs = [(None, None) if x is None else shared[x.dtype, x.device] for x in alive]
    return spec.unflatten([mask for mask, _ in pairs]), spec.unflatten([fine for _, fine in pairs])


def _norms(source: Tree, updates: Tree, block_ndim: int) -> Tree:
    """A tree of ‖G‖, (N,) or (); None for a leaf without a gradient."""

    def seen(g: Tensor | None, u: Tensor | None) -> Tensor | None:
        return None if g is None or u is None else wide(g)

    leaves, spec = flatten(map_leaves(seen, source, updates))
    norms = iter(block_norms([g for g in leaves if g is not None], block_ndim))
    return spec.unflatten([None if g is None else next(norms) for g in leaves])


def with_spikes(
    verdicts: Verdicts | None,
    updates: Tree,
    state: Any,
    factor: Hyper,
    context: Context,
    by_leaf: bool = False,
) -> tuple[Verdicts | None, SpikeState]:
    """The verdicts with spikes held too, and the spikes' state after this step.

    On a device, all leaves are joined, with the same result for each leaf as by itself.
    """
    source = updates if context.gradient is None else context.gradient
    norms = _norms(source, updates, context.block_ndim)
    together = not (context.block_ndim or by_leaf)
    joined = Joined(norms, *state)
    joins = joined.worth_it()
    join, split = (joined.join, joined.split) if joins else (_as_it_is, _as_it_is)
    flat, known = join(norms), SpikeState(*map(join, state))
    dead = None if verdicts is None else join(verdicts[0])
    over = above(flat, known, factor)
    spikes = held(over, known, verdicts and join(verdicts[1]))
    if any_held(spikes):
        dead = spikes if dead is None else map_leaves(_either, spikes, dead)
        verdicts = split(dead), split(_alive(dead, flat))
        if together:
            verdicts = _all_as_the_worst(verdicts)
            dead = join(verdicts[0])
    # What was joined is a copy, which may be written to.
    new = learned(flat, over, spikes, dead, known, donate=joins or context.donate)
    into = joined.write if joins and context.donate else split
    return verdicts, SpikeState(*map(into, new, state))


def _as_it_is(tree: Tree, others: Tree = None) -> Tree:
    """Leaf by leaf: nothing is joined."""
    return tree


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a | b


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LIMITS = {dtype: torch.finfo(dtype).max * 2.0**-20 for dtype in _DTYPES}
"""Upper limits of ‖G‖²."""


def _all_usable(norms: Sequence[Tensor | None]) -> bool:
    """Whether all can be used, as far as that can be read without waiting for a device."""
    found = [unwrapped(norm) for norm in norms if norm is not None]
    if not all([norm is not None and norm.is_cpu for norm in found]):
        return False
    return all([bool((n * n <= _LIMITS[n.dtype]).all()) for n in found if n is not None])


def surely_usable(gradients: Sequence[Tensor | None]) -> bool | None:
    """Whether `guarded` certainly holds none of these; None if that can't be read now."""
    found = [g for g in gradients if g is not None]
    if (
        is_traced()
        or any_in_parts(found)
        or not all([g.is_cpu and g.is_floating_point() for g in found])
    ):
        return None
    # The norm of a whole leaf is at least that of each of its blocks.
    squares: dict[torch.dtype, list[Tensor]] = {}
    for g in in_compute_dtype(found):
        flat = g.reshape(-1)
        squares.setdefault(flat.dtype, []).append(torch.dot(flat, flat))
    return all([bool((torch.stack(x) <= _LIMITS[dtype]).all()) for dtype, x in squares.items()])
