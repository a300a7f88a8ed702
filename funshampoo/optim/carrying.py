"""A parameter group that was edited: what is remembered goes on in a state for it as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funshampoo.distributed.gathering import gathered
from funshampoo.optim.building import Built
from funshampoo.optim.ready import ByParameter, Known, Left, fresh
from funshampoo.state.checkpoint import carried_over
from funshampoo.state.nodes import walk
from funshampoo.state.places import block_names
from funshampoo.state.stages import BlockedState


def carried(
    built: Built,
    known: list[Known],
    mine: ByParameter,
    shared: Mapping[str, Tensor],
    left: Mapping[Tensor, Left],
) -> Any:
    """A state for these parameters, with what is remembered of them.

    Args:
        built: the chain that the state is for.
        known: the parameters as they are now.
        mine, shared: what the group remembers, see `GroupRun.entries`.
        left: of parameters that come from elsewhere.

    Raises:
        ValueError: it is of other blocks, or of other shapes.
    """
    flat: dict[str, Tensor] = {}
    try:
        state = fresh(built, known)
        blocks = _blocks(state)
        for k in known:
            from_elsewhere = left.get(k.parameter)
            entries = mine.get(k.parameter, {})
            if from_elsewhere is not None:
                entries = from_elsewhere.entries
                shared = shared or from_elsewhere.shared
            _check_same_blocks(k.name, entries, blocks)
            flat |= {f"{k.name}/{entry}": x for entry, x in entries.items()}
        return carried_over(state, gathered(built.transformation, {**flat, **shared}))
    except ValueError as error:
        raise ValueError(
            "the parameter group was edited in a way that its state can't follow; nothing was "
            "changed. Undo it (max_size, merge, keep, or a parameter's shape), let the "
            "parameter start anew (del optimizer.state[parameter]), or go on with a new "
            f"optimizer. {error}"
        ) from error


def _check_same_blocks(
    name: str, entries: Mapping[str, Tensor], blocks: Mapping[str, set[str]]
) -> None:
    """What is remembered of a parameter is of blocks that it has."""
    ours = blocks.get(name, set())
    theirs = {entry.split("/")[0] for entry in entries if entry.startswith("block")}
    if ours and not theirs <= ours:
        raise ValueError(f"'{name}' falls into other blocks than before.")


def _blocks(state: Any) -> dict[str, set[str]]:
    """{parameter: the names of its blocks}."""
    found: dict[str, set[str]] = {}
    for _, node in walk(state):
        if isinstance(node, BlockedState):
            for rows in block_names(node.layout).values():
                for parameter, block in rows.values():
                    found.setdefault(parameter, set()).add(block)
    return found
