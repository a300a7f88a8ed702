"""What a stage says of its place, and what combinators refuse because of it.

Out of its place, a stage does nothing, or something else than it says, and no number shows it: a
weight decay behind the learning rate makes weights grow. So a stage has `traits`, which combinators
inherit from their parts, and look at when they are built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from funshampoo.core.live import is_ours
from funshampoo.core.tree import flatten
from funshampoo.state.stages import HyperparamsState

if TYPE_CHECKING:
    from funshampoo.core.contract import GradientTransformation

FLIPS = "flips"
"""It makes a step of a direction, by minus the learning rate, as flip_sign=True says."""

MAY_FLIP = "may flip"
"""It multiplies by a number that may be negative."""

DIRECTED = "directed"
"""It takes its updates for a direction: behind a stage that flips, its sign is the wrong one."""

TRACKS = "tracks"
"""Its state holds the weights that its updates lead to."""

LATE = "late"
"""It takes its updates for a step, and may stand behind a stage that tracks."""

ROUNDS = "rounds"
"""Its updates lead to weights that are rounded."""

WEIGHS = "weighs"
"""With zeros in the place of a weight it would make something else of the update."""

COUPLES = "couples"
"""What it does to a leaf depends on all others."""

JUDGES = "judges"
"""Outside of blocks it holds all leaves together."""

WAITS = "waits"
"""Its updates are zeros until it has seen several gradients."""

IN_BASES = "in bases"
"""What it multiplies by belongs to coordinates in eigenbases."""

OF_SIDES = "of sides"
"""Its state, or that of the stage it reads, belongs to the sides of the parameters themselves."""

IN_TF32 = "in tf32"
"""It changes the precision of products, and a graph has to be inside it."""

PARTIAL = "partial"
"""It leaves some leaves alone, or to different parts."""

SOME = " some"
"""Behind one of these words: for some of the leaves."""

_DIVIDED = (FLIPS, DIRECTED, TRACKS, ROUNDS, WAITS)

Traits = Mapping[str, str]  # {trait: the name of the stage that has it}


def with_traits(stage: GradientTransformation, *traits: str) -> GradientTransformation:
    """The stage itself, which is told of these traits."""
    stage.traits = {**stage.traits, **dict.fromkeys(traits, stage.name)}
    return stage


def inherited(parts: Iterable[GradientTransformation]) -> dict[str, str]:
    """The traits of all parts; of a trait that several have, the name of the first."""
    found: dict[str, str] = {}
    for part in parts:
        found = {**part.traits, **found}
    return found


def first_traits(
    parts: Iterable[GradientTransformation], update: Any, passes: bool, name: str
) -> Traits:
    """Those of a transformation, before it is told of others: a user's update may flip the sign."""
    may_flip = {} if passes or _is_ours(update) else {MAY_FLIP: name}
    return {**inherited(parts), **may_flip}


def wanted_by(parts: Iterable[GradientTransformation], update: Any) -> list[frozenset[str]]:
    """What the parts want of the caller; a user's update may pass it to them itself."""
    return [part.wants for part in parts] if _is_ours(update) else []


def _is_ours(update: Any) -> bool:
    return is_ours(getattr(update, "function", update))  # of a stateless stage


def without(traits: Traits, *names: str) -> dict[str, str]:
    """The traits except these."""
    return {trait: name for trait, name in traits.items() if trait not in names}


def for_some_leaves(parts: Collection[GradientTransformation], *, all_leaves: bool) -> Traits:
    """The traits of what has these parts, for some of the leaves each.

    Args:
        all_leaves: whether every leaf is one of some part's.
    """
    found = {}
    for trait, name in inherited(parts).items():
        whole = all_leaves and all([trait in part.traits for part in parts])
        found[trait + SOME * (trait in _DIVIDED and not whole)] = name
    return {**found, PARTIAL: "masked"}


def refuse(inner: GradientTransformation, where: str, **reasons: str) -> None:
    """Raise if a stage that must not stand inside does.

    Args:
        where: the name of the combinator.
        reasons: {trait, with _ for a space: why, and the remedy}; of some leaves, too.

    Raises:
        ValueError: names the stage and the combinator.
    """
    for trait, reason in reasons.items():
        trait = trait.replace("_", " ")
        name = inner.traits.get(trait, inner.traits.get(trait + SOME))
        if name is not None:
            raise ValueError(f"{where}(...) with {name}(...) in it: {reason}")


def refuse_steps(inner: GradientTransformation, where: str) -> None:
    """Raise if a stage inside makes a step, or needs to know it, where directions are compared.

    Raises:
        ValueError: names the stage and the combinator.
    """
    flips = (
        "it compares directions, and the learning rate turns them round: put that behind, as in "
        f"chain({where}(scale_by_adam()), scale_by_learning_rate(...))."
    )
    tracks = f"what changes the step has to come before it: put it behind {where}(...)."
    refuse(inner, where, flips=flips, tracks=tracks)


def check_behind_means(
    stages: Mapping[str, GradientTransformation], states: Mapping[str, Any]
) -> None:
    """Check that nothing behind a stage that waits takes the zeros of other steps for updates.

    A stage does whose own state has averages, or that goes by parameters. Rounding, and what
    changes nothing, as `tail_average`, do not mind. Nor do injected numbers: they are no averages.

    Raises:
        ValueError: names both stages.
    """
    found: Traits = {}
    for name, stage in stages.items():
        own = stage.traits
        waits = _before(found, own, WAITS)
        minds = not (stage.passes or {ROUNDS, ROUNDS + SOME} & own.keys())
        if waits and minds and (stage.needs or _has_averages(states[name])):
            raise ValueError(
                f"'{name}' stands behind {waits}, whose updates are zeros on all steps but every "
                f"n-th, and would take them for updates: put it into {waits}(chain(...), every)."
            )
        found = {**own, **found}


def _before(found: Traits, own: Traits, trait: str) -> str | None:
    """The stage with this trait before one that has `own`: for the same leaves, as far as known."""
    return found.get(trait) or (None if PARTIAL in own else found.get(trait + SOME))


def _has_averages(state: Any) -> bool:
    if isinstance(state, Tensor):
        return state.is_floating_point()
    if isinstance(state, HyperparamsState):
        return _has_averages(state.inner)
    if isinstance(state, (dict, tuple, list)):
        return any(map(_has_averages, state.values() if isinstance(state, dict) else state))
    # A node of a user's own kind.
    return any([_has_averages(x) for x in flatten(state)[0] if x is not state])


def in_sequence(stages: Iterable[GradientTransformation]) -> dict[str, str]:
    """The traits of a chain.

    Raises:
        ValueError: a stage stands behind one that has to come after it; names both.
    """
    found: dict[str, str] = {}
    whole = False
    for stage in stages:
        own = stage.traits
        flips, directed = found.get(FLIPS), own.get(DIRECTED)
        flips_some, directed_some = found.get(FLIPS + SOME), own.get(DIRECTED + SOME)
        if (flips and (directed or directed_some)) or (flips_some and directed):
            flips, directed = flips or flips_some, directed or directed_some
            raise ValueError(
                f"{directed} stands behind {flips}, which turns a direction into a step, "
                f"-learning_rate times it: there its sign is the wrong one. Put {directed} before "
                "it, or scale(-1.0) between the two."
            )
        if OF_SIDES in found and IN_BASES in own:
            raise ValueError(
                f"{own[IN_BASES]} is for coordinates in eigenbases: put it into in_eigenbasis(...)."
            )
        last, tracks = _before(found, own, ROUNDS), _before(found, own, TRACKS)
        if last and not stage.passes:
            raise ValueError(
                f"{last}: '{stage.name}' behind it changes updates that are rounded: put {last} "
                "last, behind scale_by_learning_rate."
            )
        if tracks and not stage.passes and not {LATE, ROUNDS, ROUNDS + SOME} & own.keys():
            raise ValueError(
                f"{tracks}: '{stage.name}' behind it changes the step, so that the weights are not "
                f"those that {tracks} has in its state: put '{stage.name}' before it. A stage of "
                "yours that changes nothing says so by passes=True."
            )
        if MAY_FLIP in found:  # whatever comes in, a later stage may get its negative
            own = without(own, DIRECTED, DIRECTED + SOME)
        if MAY_FLIP in own:
            found = without(found, FLIPS, FLIPS + SOME)
        whole = whole or PARTIAL not in own
        found = {**own, **found}
    return without(found, PARTIAL) if whole else found
