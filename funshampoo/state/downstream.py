"""The states of later stages, from before the step, as read by an earlier stage."""

from __future__ import annotations

from typing import Any

from funshampoo.core.tree import MaskedNode, flatten, map_leaves
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.state.nodes import first_state
from funshampoo.state.stages import KroneckerState, RefreshedState
from funshampoo.state.upstream import hidden_error


def kept_later(later: tuple[Any, ...], through: str, updates: Any) -> tuple[Any, Any]:
    """The kept values of the next stage of this kind, and a tree of its gradient counts, or of ().

    Raises:
        ValueError: there is none, it belongs to other statistics in between, or a leaf is hidden
            from it.
    """
    wanted: Any = RefreshedState if through == "roots" else EigenbasisState
    stage = "root_inverse(...)" if through == "roots" else "in_eigenbasis(...)"
    # The bases in `in_eigenbasis` are not roots; a stage after other statistics belongs to those.
    found: Any = first_state(later, (wanted, KroneckerState), closed=EigenbasisState)
    if isinstance(found, KroneckerState):
        raise ValueError(
            f'kl_statistics(through="{through}") is followed by other statistics, by which {stage} '
            f"goes: put its own {stage} between, or leave out one of the two."
        )
    try:
        bases = found if through == "roots" else found.bases
        kept = flatten(updates)[1].flatten_up_to(bases.kept)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f'kl_statistics(through="{through}") found no {stage} for its blocks: put it after it '
            f"in the same chain, as in chain(kl_statistics(...), {stage})."
            f"{_of_another(later, through)}"
        ) from error
    if MaskedNode in map(type, kept):
        raise hidden_error(kept, updates, f'kl_statistics(through="{through}")', stage)
    # Roots, Ritz values, and bases that start as the identity have no count.
    counted = through == "eigenvalues" and found.seen != ()
    return bases.kept, found.seen if counted else map_leaves(lambda u: (), updates)


def _of_another(later: tuple[Any, ...], through: str) -> str:
    """The remedy if the stage that the other `through` reads is there instead; else ""."""
    kind: Any = EigenbasisState if through == "roots" else RefreshedState
    if first_state(later, kind, closed=EigenbasisState) is None:
        return ""
    named = ("in_eigenbasis", "eigenvalues") if through == "roots" else ("root_inverse", "roots")
    return f' With the {named[0]}(...) that is there goes through="{named[1]}".'
