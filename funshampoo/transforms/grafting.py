"""Grafting: the direction of one method, the step length of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, count_of, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Phase, Tree, as_transformation
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.tree import columns_of, flatten
from funshampoo.linalg.norms import block_norms, range_limits, range_scale, stand
from funshampoo.operators.columns import (
    Column,
    in_compute_dtype,
    per_block,
    plus,
    product,
    quotient,
)
from funshampoo.state.stages import GraftState


def graft(
    direction: GradientTransformation,
    onto: GradientTransformation,
    *,
    start: int = 1,
    least_order: int = 0,
) -> GradientTransformation:
    """Give the direction of one transformation the norm of another, block by block.

        P ← P ‖P_g‖ / (‖P‖ + 1e-16),  P = direction(M),  P_g = onto(M)

    Norms are Euclidean, over a block inside `blocked` and over a leaf elsewhere, in float32 at
    least. They are right where their squares leave the dtype's range, and ‖P_g‖ is no larger than
    the largest number. NaN or inf anywhere in P or P_g makes that block NaN. Both methods receive
    the same updates M and the same context, so that `onto` builds its second moment from `gradient`
    and applies it to M.

    Args:
        direction: usually `root_inverse(...)`.
        onto: the method whose step length is trusted: `scale_by_rms`, `scale_by_adam(beta1=0)`,
            `scale_by_adagrad`, `scale_by_sgd`, or any other transformation.
        start: before this step the result is P_g itself. Use the first refresh of `direction`.
        least_order: a block (a leaf outside `blocked`) of fewer sides gets P_g itself on all steps.
            Use 2 with a `direction` that leaves vectors alone: M in the length of P_g is no step
            of either method.

    State: `GraftState`.

    Raises:
        ValueError: start < 1 or least_order < 0.

    Reference: Agarwal et al., arXiv 2002.11803; Shi et al., arXiv 2309.06497.

    >>> import torch
    >>> from funshampoo import scale, scale_by_sgd
    >>> tx = graft(scale(100.0), onto=scale_by_sgd())
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params))[0]
    {'w': tensor([3., 4.])}
    """
    direction, onto = as_transformation(direction), as_transformation(onto)
    check_count("start", start)
    check_count("least_order", least_order, 0)

    counts = start > 1 or direction.counts or onto.counts

    def init(params: Tree, *, clock: bool = False, **context: Any) -> GraftState:
        context["clock"] = clock or counts
        states = direction.init(params, **context), onto.init(params, **context)
        return GraftState(*states, started(counts, clock))

    def update(
        updates: Tree, state: GraftState, params: Tree, context: Context
    ) -> tuple[Tree, GraftState]:
        inside = running(state.steps, context)
        found = direction.run(updates, state.direction, params, inside)
        p, direction_state = checked_pair(found, direction.name)
        # Whose bases are those of statistics before both is to be seen there.
        inside = changed(inside, earlier=(*inside.earlier, state.direction))
        found = onto.run(updates, state.onto, params, inside)
        p_g, onto_state = checked_pair(found, onto.name)
        del found
        block_ndim, t = context.block_ndim, inside.step if start > 1 else 1
        begun_now = None if t is not None else count_of(state.steps, context) + 1 >= start
        new = GraftState(direction_state, onto_state, advanced(state.steps, context.donate))
        if t is not None and t < start:
            return p_g, new
        leaves, spec = flatten(p_g)
        (directions,) = columns_of((p,), spec, p_g)
        places = []
        for i, (x, goes) in enumerate(zip(leaves, directions)):
            if x is not None and x.ndim - block_ndim >= least_order:
                if goes is None:  # a length without a direction is no step
                    leaves[i] = None
                else:
                    places.append(i)
        if not places:
            return spec.unflatten(leaves), new
        partners = in_compute_dtype(map(leaves.__getitem__, places))
        lengths, plain = _step_lengths(partners, block_ndim)
        if begun_now is None:  # they are as large as p, and no longer needed
            del partners, p_g
            for i in places:
                leaves[i] = None
        column = in_compute_dtype(map(directions.__getitem__, places))
        grafted = _rescaled(column, lengths, plain, block_ndim)
        for i, x in zip(places, grafted):
            if begun_now is None:
                leaves[i] = x
            else:  # in torch.compile the counter is a tensor without a value
                leaves[i] = torch.where(begun_now.to(x.device), x, leaves[i])
        return spec.unflatten(leaves), new

    def phase(step: int) -> Phase:
        inside = (*direction.phase(step), *onto.phase(step))
        return (f"before step {start}", *inside) if step < start else inside

    parts = {"direction": direction, "onto": onto}
    return GradientTransformation(init, update, phase=phase, parts=parts, counts=counts)


_SMALL = 1e-16  # beside ‖P‖, as in the Distributed Shampoo reference


def _step_lengths(p_g: Column, block_ndim: int) -> tuple[Column, bool]:
    """‖P_g‖, at most the largest number; NaN where there is an infinite entry.

    And whether these are plain norms, none of which is out of range.
    """
    norms = block_norms(p_g, block_ndim)
    if stand(norms, p_g):
        return norms, True
    if not _alike(norms):
        return [_step_lengths([x], block_ndim)[0][0] for x in p_g], False
    scale = range_scale(_joined(norms))
    scaled = product(p_g, per_block(_parted(scale, norms), p_g))
    length = _nan_if_infinite(_joined(block_norms(scaled, block_ndim))) / scale
    return _parted(torch.clamp(length, max=torch.finfo(length.dtype).max), norms), False


def _rescaled(p: Column, lengths: Column, plain: bool, block_ndim: int) -> Column:
    """P length / (‖P‖ + 1e-16); `plain` as of `_step_lengths`."""
    norms = block_norms(p, block_ndim)
    if plain and stand(norms, p):
        ratio = quotient(lengths, plus(norms, _SMALL))
        return product(p, per_block(ratio, p))
    if not (_alike(norms) and _alike(lengths)):
        return [_rescaled([x], [n], False, block_ndim)[0] for x, n in zip(p, lengths)]
    length, scale = _joined(lengths), range_scale(_joined(norms))
    p = product(p, per_block(_parted(scale, norms), p))
    divisor = _nan_if_infinite(_joined(block_norms(p, block_ndim))) + _SMALL * scale
    # The quotient of the two may be out of range where the product of all three is not.
    least, most = range_limits(length.dtype)
    usual = (scale == 1) & (length >= least) & (length <= most)
    first = torch.where(usual, length, 1.0) / divisor
    second = torch.where(usual, 1.0, length)
    p = product(p, per_block(_parted(first, norms), p))
    return product(p, per_block(_parted(second, norms), p))


def _nan_if_infinite(norm: Tensor) -> Tensor:
    return norm + norm * 0.0


def _alike(norms: Column) -> bool:
    """Whether these can be worked on as one tensor: a few operators, however many leaves."""
    return len({(norm.dtype, norm.device) for norm in norms}) == 1


def _joined(norms: Column) -> Tensor:
    return torch.cat(norms) if norms[0].ndim else torch.stack(norms)


def _parted(joined: Tensor, norms: Column) -> Column:
    """One value for each of the norms that were joined."""
    if norms[0].ndim:
        return list(torch.split(joined, [len(norm) for norm in norms]))
    return list(joined.unbind())
