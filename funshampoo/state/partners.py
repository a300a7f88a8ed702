"""The states of a stage's partners, earlier or later ones, and errors for missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funshampoo.core.tree import MaskedNode, flatten, leaf_names, map_leaves
from funshampoo.state.eigenbases import EigenbasisState, KlState
from funshampoo.state.nodes import find_state, first_state
from funshampoo.state.stages import GraftState, KroneckerState, RefreshedState


def statistics_of(upstream: Any, stage: str, tree: Any) -> KroneckerState:
    """The factor matrices that `kronecker_statistics` or `kl_statistics` keeps of this tree.

    Args:
        upstream: from the context, in `init` or in `update`.
        stage: the name of the calling stage, for error messages.
        tree: the parameters or updates of that stage.

    Raises:
        ValueError: no stage before it keeps any, they belong to another tree, or a leaf has none.

    >>> import torch
    >>> from funshampoo import kronecker_statistics
    >>> params = {"w": torch.zeros(2, 3)}
    >>> upstream = (kronecker_statistics().init(params),)
    >>> [tuple(L.shape) for L in statistics_of(upstream, "mine", params).factors["w"]]
    [(2, 2), (3, 3)]
    """
    found = find_state(upstream, KroneckerState)
    if found is None:
        raise ValueError(
            f"{stage} found no factor matrices: put kronecker_statistics(...), or kl_statistics"
            f"(...), before it in the same chain, as in chain(kronecker_statistics(0.99), "
            f"{stage}(...))."
        )
    try:
        factors = flatten(tree)[1].flatten_up_to(found.factors)
    except ValueError as error:
        raise ValueError(
            f"{stage} found the factor matrices of other blocks: put the stage that makes them "
            f"and {stage} inside the same blocked(...)."
        ) from error
    if any([type(x) is MaskedNode for x in factors]):
        raise _hidden(factors, tree, stage, "kronecker_statistics(...)")
    return found


def check_nearest(upstream: tuple[Any, ...], stage: str) -> None:
    """Check that one stage with factor matrices is nearer than all others. In `init`.

    Raises:
        ValueError: both branches of a `graft` before it have some; or a `kl_statistics` before the
            nearest has no roots or bases of its own, between the two.
    """
    found: Any = find_state(upstream, (KroneckerState, KlState, GraftState))
    if isinstance(found, KroneckerState):
        own: Any = find_state(upstream, (KlState, RefreshedState, EigenbasisState))
        if isinstance(own, KlState):
            stages = "root_inverse(...) or in_eigenbasis(...)"
            raise _other_statistics("kl_statistics(...)", f"{stage}(...)", stages)
    if isinstance(found, GraftState):
        branches = found.direction, found.onto
        if None not in [find_state(branch, KroneckerState) for branch in branches]:
            raise ValueError(
                f"{stage} found factor matrices in both branches of the graft(...) before it, and "
                "neither is nearer: put statistics of its own behind the graft, or make one "
                "kronecker_statistics(...) before it serve all three."
            )


def kept_later(later: tuple[Any, ...], through: str, updates: Any) -> tuple[Any, Any]:
    """The kept values of the next stage of this kind, and a tree of its gradient counts, or of ().

    Raises:
        ValueError: there is none, it belongs to other statistics in between, or a leaf is hidden
            from it.
    """
    wanted: Any = RefreshedState if through == "roots" else EigenbasisState
    stage = "root_inverse(...)" if through == "roots" else "in_eigenbasis(...)"
    own = f'kl_statistics(through="{through}")'
    # The bases in `in_eigenbasis` are not roots; a stage after other statistics belongs to those.
    found: Any = first_state(later, (wanted, KroneckerState), closed=EigenbasisState)
    if isinstance(found, KroneckerState):
        raise _other_statistics(own, stage, stage)
    try:
        bases = found if through == "roots" else found.bases
        kept = flatten(updates)[1].flatten_up_to(bases.kept)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{own} found no {stage} for its blocks: put it after it in the same chain, as in "
            f"chain(kl_statistics(...), {stage}).{_of_another(later, through)}"
        ) from error
    if any([type(x) is MaskedNode for x in kept]):
        raise _hidden(kept, updates, own, stage)
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


def _other_statistics(kl: str, stage: str, partners: str) -> ValueError:
    """The error if the stage behind a `kl_statistics` goes by others, between the two."""
    return ValueError(
        f"{kl} is followed by other statistics, by which {stage} goes: put its own {partners} "
        "between, or leave out one of the two."
    )


def _hidden(parts: Sequence[Any], tree: Any, stage: str, other: str) -> ValueError:
    """The error if leaves of a stage are hidden from its partner stage; it names one.

    Args:
        parts: what the partner has for each leaf of the tree.
        stage, other: the names of the two.
    """
    first = [isinstance(part, MaskedNode) for part in parts].index(True)
    return ValueError(
        f"{stage} found no {other} for '{leaf_names(tree)[first]}', which masked(...) or "
        "partition(...) hides from it: put a chain of the two inside of that."
    )
