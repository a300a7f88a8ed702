"""What is said where ranks do not agree: what differs, on which rank, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from funshampoo.distributed.collectives import ProcessGroup, gathered_objects
from funshampoo.distributed.described import Line

_REMEDY = (
    "Give all of them the same parameters in the same order, as DistributedDataParallel has them, "
    "the same hyperparameters, and zeros where others have a gradient. This step moved no "
    "parameter; after the first one, a donated state is spent: go on from a checkpoint."
)


class Bits(NamedTuple):
    """One number a leaf, `bits_of`: of the parameters ([] where there are none) and gradients."""

    value: list[int]
    gradient: list[int]


_NO_BITS = Bits([], [])


def disagreement(
    lines: list[Line],
    group: ProcessGroup | None,
    bits: Bits = _NO_BITS,
    names: Sequence[str] = (),
) -> RuntimeError:
    """The error that says on which rank what differs. Every rank has to ask for it."""
    found = gathered_objects((lines, bits, list(names)), group)
    (first, orders, ours), others = found[0], found[1:]
    for rank, (theirs, its_orders, _) in enumerate(others, start=1):
        if theirs != first:
            return RuntimeError(difference(first, theirs, rank))
        for what, order, other in zip(Bits._fields, orders, its_orders):
            if other != order and sorted(other) == sorted(order):
                i = next(i for i, (a, b) in enumerate(zip(order, other)) if a != b)
                j = other.index(order[i])
                return RuntimeError(f"{_moved(ours[i], ours[j], rank, what)} {_REMEDY}")
    return RuntimeError(f"sharded: the ranks do not agree. {_REMEDY}")


def difference(first: list[Line], other: list[Line], rank: int) -> str:
    """What the first difference between rank 0 and another is, in words, and the remedy."""
    return f"{_difference(first, other, rank)} {_REMEDY}"


def _difference(first: list[Line], other: list[Line], rank: int) -> str:
    pairs = zip([*first, ("", "nothing more")], [*other, ("", "nothing more")])
    (label, ours), (their_label, theirs) = next((a, b) for a, b in pairs if a != b)
    if label != their_label:
        ours, theirs = f"{label}: {ours}", f"{their_label}: {theirs}"
        return f"sharded: the ranks do not agree: rank 0 has {ours}; rank {rank} {theirs}."
    return f"sharded: the ranks do not agree: {label} is {ours} on rank 0, {theirs} on rank {rank}."


def _moved(name: str, other: str, rank: int, what: str) -> str:
    return (
        "sharded: the ranks do not agree on the order of the parameters: by its "
        f"{what}, '{name}' of rank 0 is '{other}' of rank {rank}."
    )


def changed(words: list[Line], those: Sequence[bool], group: ProcessGroup | None) -> RuntimeError:
    """The error that says what some ranks step now, others not. Every rank has to ask for it.

    Args:
        words: what this rank steps.
        those: for every rank, whether it steps something else than before.
    """
    everyone = gathered_objects(words, group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            return RuntimeError(difference(everyone[0], theirs, rank))
    return RuntimeError(
        f"sharded: the ranks do not agree: rank {those.index(True)} was given other parameters, "
        "gradients of another dtype or another chain than at the step before, and rank "
        f"{those.index(False)} was not. {_REMEDY}"
    )
