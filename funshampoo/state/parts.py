"""Ranks' parts of a checkpoint: how a part is labelled, and how parts are merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.placed import is_in_parts, local_part
from funshampoo.core.tree import flatten
from funshampoo.core.wholes import whole_of
from funshampoo.state.nodes import walk
from funshampoo.state.stages import ShardedState

PART_KEY = "funshampoo/part"
RUN = ("sharded", "run")  # how the path of `ShardedState.run` ends


_SIZES = 2**20  # upper limit of the ranks that can share


class Part(NamedTuple):
    """Which part of a state a checkpoint is: these numbers, as one int64 entry.

    Attributes:
        rank: the rank that saved it, of `size` that share the state; 0 of 1 if it is not shared.
        bits: a sum over all bits of its tensors, which reveals pieces of different saves; None if
            not computed.
        run: the run number, below 2^43; 0 if there is none: for a whole state, or one that has not
            stepped.
    """

    rank: int
    size: int
    bits: int | None = None
    run: int = 0

    def entry(self) -> Tensor:
        """[rank, size + 2^20 run, bits] (3,) int64 on the CPU, without `bits` (2,).

        Its shape is the same with or without a run, for torch.distributed.checkpoint to read into.
        """
        numbers = [self.rank, self.size + _SIZES * self.run, self.bits]
        found = [x for x in numbers if x is not None]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    @classmethod
    def read(cls, entry: Any) -> Part:
        """Parse the entry.

        Raises:
            ValueError: not such an entry.
        """
        fits = isinstance(entry, Tensor) and entry.dtype == torch.int64
        if fits and entry.ndim == 1 and len(entry) in (2, 3):
            rank, of, *bits = entry.tolist()
            part = cls(rank, of % _SIZES, bits[0] if bits else None, of // _SIZES)
            if 0 <= part.rank < part.size and part.run >= 0:
                return part
        raise ValueError(f"'{PART_KEY}' is no [rank, ranks, bits]: the checkpoint is damaged.")


def part_of(state: Any) -> Part:
    """Which part a state is, by the largest group of ranks, or mesh, that shares any of it."""
    found, run = [Part(0, 1)], 0
    for _, node in walk(state):
        if isinstance(node, ShardedState):
            rank, size = next(iter(node.ranks)).split(" of ")
            found.append(Part(int(rank), int(size)))
            run = max(run, run_of(node))
    for x in flatten(state)[0]:
        if is_in_parts(x) and x.device_mesh.get_coordinate() is not None:
            ranks = x.device_mesh.mesh.flatten().tolist()
            found.append(Part(ranks.index(x.device_mesh.get_rank()), len(ranks)))
    return max(found, key=lambda part: part.size)._replace(run=run)


def run_of(state: ShardedState) -> int:
    """The state's run number; 0 if there is none yet."""
    return int(state.run) if isinstance(state.run, Tensor) and not state.run.is_meta else 0


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(x: Tensor) -> Tensor:
    """() int64: the sum of its elements' bits read as integers, exact in any order."""
    plain = torch.view_as_real(x) if x.is_complex() else x
    local = local_part(plain)
    return local.detach().view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)


def bits_of(tensors: Iterable[Tensor]) -> int:
    """The sum of all elements' bits read as integers, modulo 2^64, in any order.

    One pass over the memory, and one synchronization per device.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        if not x.is_meta:
            sums.setdefault(x.device, []).append(sum_of_bits(x))
    total = sum(int(torch.stack(found).sum()) for found in sums.values())
    return (total + 2**63) % 2**64 - 2**63


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the checkpoints of several ranks into one: from `state_dict`, or from the wrapper's.

    The parts of all ranks are needed. One rank's may come in pieces, and more than once. DTensors,
    the state of sharded parameters outside `blocked`, become plain tensors. The run number is left
    out: the whole is the same on any number of ranks.

    Raises:
        ValueError: the part of a rank is missing; parts are from different numbers of ranks, or
            different runs; two have different values under one name, or are pieces of different
            saves.

    >>> import torch
    >>> sorted(merged([{"a": torch.ones(1), "n": torch.tensor(3)}, {"n": torch.tensor(3)}]))
    ['a', 'n']
    """
    given = list(parts)
    _check_complete([dict(_said(part)) for part in given])
    return _united(given, "")


def _said(tree: Mapping[Any, Any]) -> Iterable[tuple[int, int]]:
    """(ranks, rank) of every group that shares some of a part, at any depth."""
    for name, x in tree.items():
        if isinstance(x, Mapping):
            yield from _said(x)
        elif _says_part(name):
            part = Part.read(x)
            yield part.size, part.rank


def _says_part(name: Any) -> bool:
    """Whether it is a part entry; the wrapper's state dicts also have it as "shared/..."."""
    return isinstance(name, str) and (name == PART_KEY or name.endswith("/" + PART_KEY))


def _check_complete(said: Sequence[Mapping[int, int]]) -> None:
    sizes = {tuple(sorted(groups)) for groups in said}
    if len(sizes) > 1:
        found = ", ".join(" and ".join(map(str, each)) or "unknown" for each in sorted(sizes))
        raise ValueError(
            f"the parts were not saved together: they are of different numbers of ranks ({found}). "
            "Give those of one save."
        )
    for size in next(iter(sizes), ()):
        missing = sorted(set(range(size)) - {groups[size] for groups in said})
        if missing:
            raise ValueError(
                f"of the parts of {size} ranks, that of rank {', '.join(map(str, missing))} is "
                "missing: give what every rank saved."
            )


def _united(parts: Sequence[Mapping[Any, Any]], path: str) -> dict[Any, Any]:
    together: dict[Any, Any] = {}
    said: list[Part] = []
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        if _says_part(name):
            said = [Part.read(x) for x in found]
        elif all(isinstance(x, Mapping) for x in found):
            together[name] = _united(found, f"{path}{name}/")
        elif any(map(is_in_parts, found)):
            together[name] = whole_of(found, f"{path}{name}")
        elif all(_identical(found[0], x) for x in found[1:]):
            together[name] = found[0]
        else:
            raise ValueError(
                f"'{path}{name}' differs between the parts: they were not saved at the same step "
                "of the same training."
            )
    _check_one_save(said)
    if any(PART_KEY in part for part in parts):
        own = (x for name, x in together.items() if isinstance(x, Tensor) and not is_note(name))
        together[PART_KEY] = Part(0, 1, bits_of(own)).entry()
    return together


def _check_one_save(parts: Sequence[Part]) -> None:
    """Check that the pieces of one rank's part are from the same state."""
    runs = list(dict.fromkeys(part.run for part in parts))
    if len(runs) > 1:
        raise ValueError(
            f"the parts are of different runs ({', '.join(f'{run:x}' for run in runs)}): "
            "give those of one save."
        )
    bits: dict[int, int | None] = {}
    for part in parts:
        if bits.setdefault(part.rank, part.bits) != part.bits:
            raise ValueError(
                f"of rank {part.rank} there are pieces of different states: they were not saved at "
                "the same step of the same training."
            )


def is_note(name: str) -> bool:
    """Whether an entry is about the checkpoint, and not a tensor of the state."""
    return name.startswith("funshampoo/")


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
