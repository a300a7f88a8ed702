"""Messages for a checkpoint and a state that do not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from funshampoo.core.placed import is_in_parts
from funshampoo.core.wholes import lies_as
from funshampoo.state.parts import Part

_GUARDED_NOW = (
    "This chain holds what is not finite, and the checkpoint's did not: with strict=False the "
    "counts of that begin at 0; to go on as it was, give guard=False (in for_model, for what AdamW "
    "has, other_options={'guard': False})."
)
_GUARDED_THEN = (
    "The checkpoint's chain held what is not finite, and this one does not: to go on as it was, "
    "give guard=True, or guarded(...) around it; with strict=False the counts are left out."
)
_COUNTS_NOW = (
    "This chain counts steps, and the checkpoint's did not: with strict=False the count "
    "begins at 0."
)
_COUNTED_THEN = (
    "The checkpoint's chain counted steps, and this one does not: strict=False leaves that out."
)


class MisfitError(ValueError):
    """A checkpoint has other names, shapes or dtypes than the state."""


def misfit(name: str, x: Tensor, saved: Any, cast: bool) -> str:
    """Why this value can't replace x; "" if it can."""
    if not isinstance(saved, Tensor):
        return f"'{name}' is no tensor there, but a {type(saved).__name__}"
    if saved.shape != x.shape:
        return f"'{name}' has shape {tuple(saved.shape)} there and {tuple(x.shape)} here"
    if is_in_parts(saved) and not lies_as(x, saved):
        return (
            f"'{name}' is a part of a DTensor there, and another one, or the whole, here: load "
            "what funshampoo.state.merged makes of all parts"
        )
    both_float = saved.is_floating_point() and x.is_floating_point()
    if saved.dtype != x.dtype and not (cast and both_float):
        remedy = "; cast=True converts it" if both_float else ""
        return f"'{name}' is {saved.dtype} there and {x.dtype} here{remedy}"
    return ""


def blocks_differ(here: Iterable[str], there: Iterable[str], whole: bool) -> bool:
    """Whether a parameter that both have is in other blocks there, by their names.

    Args:
        here, there: names of entries, or of blocks.
        whole: whether the checkpoint has all blocks, not one rank's part of them.
    """
    ours, theirs = _blocks_of(here), _blocks_of(there)
    both = ours.keys() & theirs.keys()
    return any(theirs[p] != ours[p] if whole else not theirs[p] <= ours[p] for p in both)


def _blocks_of(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        parameter, _, rest = name.partition("/")
        block = rest.partition("/")[0]
        if block.startswith("block_"):
            found.setdefault(parameter, set()).add(block)
    return found


def report(
    misfits: list[str],
    missing: list[str],
    unknown: list[str],
    part: Part | None,
    other_blocks: bool,
) -> str:
    """One message for all of them, with the remedies.

    Args:
        misfits: as from `misfit`.
        missing, unknown: names.
        part: which part of a state the checkpoint is, if it says so.
        other_blocks: whether a parameter is in other blocks there.
    """
    lines = ["the checkpoint does not fit the state; nothing was changed."]
    for title, names in (
        ("does not fit", misfits),
        ("missing from the checkpoint", missing),
        ("unknown to the state", unknown),
    ):
        if names:
            lines.append(f"{title}: {listed(names)}")
    if missing and part is not None and part.size > 1:
        lines.append(
            f"It is the part of rank {part.rank} of {part.size}: save every rank's, and load "
            "funshampoo.state.merged(parts)."
        )
    if other_blocks or any("/block" in line and "' has shape" in line for line in misfits):
        lines.append(
            "Blocks of other shapes or names come from another max_size, merge or keep: build the "
            "chain with those of the checkpoint. Or the parameters have other shapes there."
        )
    for names, remedy in ((missing, _GUARDED_NOW), (unknown, _GUARDED_THEN)):
        if names and all(["guarded/" in name for name in names]):
            lines.append(remedy)
    for names, remedy in ((missing, _COUNTS_NOW), (unknown, _COUNTED_THEN)):
        if [*missing, *unknown] == names and len(names) == 1 and names[0].endswith("/steps"):
            lines.append(remedy)
    if missing or unknown:
        # Not "strict=False" alone: torch's flattened helpers have one that does not reach this.
        lines.append(
            "load_state_dict(saved, strict=False), called by yourself, loads what fits and leaves "
            "out the rest."
        )
    return "\n".join(lines)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first ten, say, and the total count."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
