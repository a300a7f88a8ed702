"""Grafting: the direction of one method, the step length of another."""

from __future__ import annotations

from typing import Any

from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, count_of, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Phase, Tree, as_transformation
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.traits import FLIPS, MAY_FLIP, refuse, without
from funshampoo.core.tree import columns_of, flatten
from funshampoo.operators.lengths import take_lengths
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import GraftState, RefreshedState


def graft(
    direction: GradientTransformation,
    onto: GradientTransformation,
    *,
    start: int = 1,
    least_order: int = 0,
) -> GradientTransformation:
    """Grafting: give one transformation's direction the norm of another's, block by block.

        P ← P ‖P_g‖ / (‖P‖ + 1e-16),  P = direction(M),  P_g = onto(M)

    Norms are Euclidean, over a block inside `blocked` and over a leaf elsewhere, in float32 or
    wider. They are correct even where squares leave the dtype's range, and ‖P_g‖ is capped at the
    largest number. NaN or inf anywhere in P or P_g makes that block NaN. Both methods get the same
    updates M and the same context, so `onto` builds its second moment from `gradient` and applies
    it to M.

    Args:
        direction: usually `root_inverse(...)`.
        onto: the method whose step length is trusted: `scale_by_rms`, `scale_by_adam(beta1=0)`,
            `scale_by_adagrad`, `scale_by_sgd`, or any other transformation.
        start: before this step the result is P_g itself. Set it to `direction`'s first refresh.
        least_order: a block (outside `blocked`, a leaf) with fewer sides always gets P_g itself.
            Use 2 with a `direction` that leaves vectors alone: M at the length of P_g is neither
            method's step.

    State: `GraftState`.

    Raises:
        ValueError: start < 1 or least_order < 0; a stage in it averages or rounds weights, or only
            one of the two scales by the learning rate where either is used.

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
    for part in (direction, onto):
        behind = "grafting changes what it returns: put it behind graft(...)."
        refuse(part, "graft", tracks=behind, rounds=behind)
    flipped = [FLIPS in part.traits for part in (direction, onto)]
    may_flip = MAY_FLIP in direction.traits or MAY_FLIP in onto.traits
    if flipped[0] != flipped[1] and not may_flip and (start > 1 or least_order):
        raise ValueError(
            "graft: one of direction and onto scales by the learning rate, and the other does not, "
            "so the steps of one are uphill: put scale_by_learning_rate behind graft(...)."
        )

    counts = start > 1 or direction.counts or onto.counts

    def init(params: Tree, *, clock: bool = False, **context: Any) -> GraftState:
        context["clock"] = clock or counts
        first = direction.init(params, **context)
        # Shows `onto` that what goes by the statistics before both may be in `direction`.
        if (kept := find_state(first, (EigenbasisState, RefreshedState))) is not None:
            context["upstream"] = (*context.get("upstream", ()), kept)
        return GraftState(first, onto.init(params, **context), started(counts, clock))

    def update(
        updates: Tree, state: GraftState, params: Tree, context: Context
    ) -> tuple[Tree, GraftState]:
        inside = running(state.steps, context)
        found = direction.run(updates, state.direction, params, inside)
        p, direction_state = checked_pair(found, direction.name)
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
        del p, p_g  # as large as the parameters, and freed one by one
        take_lengths(leaves, directions, block_ndim, least_order, begun_now)
        return spec.unflatten(leaves), new

    def phase(step: int) -> Phase:
        inside = (*direction.phase(step), *onto.phase(step))
        return (f"before step {start}", *inside) if step < start else inside

    parts = {"direction": direction, "onto": onto}
    found = GradientTransformation(init, update, phase=phase, parts=parts, counts=counts)
    if not flipped[0]:  # the sign is that of the direction
        found.traits = without(found.traits, FLIPS)
    return found
