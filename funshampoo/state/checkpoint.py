"""Checkpoints: a state as a flat mapping of names to tensors, and back.

A name says what a tensor is, not where it happened to lie:

    conv1.weight/block_0_1/kronecker_statistics/factors/0    a block's, in block space
    conv1.weight/trace/buffer                                a leaf's, outside
    graft/steps                                              nobody's, such as a counter

So it does not depend on stacks, ranks, or the place of a stage among others, and a checkpoint of N
ranks, the union of what each rank saved, loads on M.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.operators.packed import in_form_of
from funshampoo.state.places import Place, block_names, map_tensors, rows_of, spans_of
from funshampoo.state.stages import BlockedState, ShardedState, walk

FORMAT = 2
FORMAT_KEY = "funshampoo/format"
PART_KEY = "funshampoo/part"


class Loaded(NamedTuple):
    """What `load_state_dict` returns.

    Attributes:
        state: with the saved values.
        missing: names that the state has and the checkpoint lacks; they keep the values that they
            had in the state passed in.
        unknown: names of the checkpoint for which the state has no place.
    """

    state: Any
    missing: list[str]
    unknown: list[str]


def state_dict(state: Any) -> dict[str, Tensor]:
    """A state as {name: tensor}: flat, readable by torch.load(weights_only=True) and safetensors.

    Args:
        state: of any transformation. Of a sharded one, what this rank owns: every rank saves its
            own, and `merged` unites them.

    Returns:
        Views of the state's tensors, not copies; beside them the version of this format, a
        0-dimensional int64 tensor under "funshampoo/format".

    Raises:
        ValueError: two tensors would have one name; says which. Name the stages apart.

    >>> import torch
    >>> from funshampoo import blocked, trace
    >>> saved = state_dict(blocked(trace(0.9), max_size=2).init({"w": torch.zeros(3)}))
    >>> {name: tuple(x.shape) for name, x in saved.items()}
    {'funshampoo/format': (), 'w/block_0/buffer': (2,), 'w/block_1/buffer': (1,)}
    """
    found = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu")}
    for owner, rest, x in named_tensors(state):
        found["/".join(filter(None, [owner, rest]))] = x
    return found


def named_tensors(state: Any) -> list[tuple[str, str, Tensor]]:
    """(parameter or "", rest of the name, view) for every tensor of `state_dict`.

    Raises:
        ValueError: two of them have one name.
    """
    found: dict[tuple[str, str], Tensor] = {}
    names = _Names()

    def collect(place: Place, x: Tensor) -> Tensor:
        for owner, rest, part in names.parts(place, x):
            if (owner, rest) in found:
                raise ValueError(
                    f"two tensors of the state would be saved as '{owner}/{rest}': give the two "
                    "stages different names, as in chain(('slow', trace(0.9)), ...)."
                )
            found[owner, rest] = part
        return x

    map_tensors(collect, state)
    return [(owner, rest, x) for (owner, rest), x in found.items()]


def load_state_dict(
    state: Any, saved: Mapping[str, Tensor], *, strict: bool = True, cast: bool = False
) -> Loaded:
    """A state like `state` with the values of a checkpoint, on the devices of `state`.

    Everything is checked before anything is built, and nothing passed in is written to.

    Args:
        state: a fresh tx.init(params), whose structure rules. On several ranks each gives its own.
        saved: from `state_dict`, on any number of ranks; see `merged`.
        strict: a name that is missing or unknown is an error. False reports it instead.
        cast: convert floating-point values to the dtypes of `state`; else another dtype is an
            error.

    A checkpoint says nothing of the chain's numbers: rates, decays and intervals are what the new
    chain has. Nor does it of the solver: another one takes over at the next refresh. Factor
    matrices and roots that were saved packed are unpacked where `state` has them so, and the
    reverse. Another block
    size changes the blocks' shapes, which is an error that says so.

    Raises:
        ValueError: names missing or unknown (all are listed), another shape or dtype, another
            version of the format.

    >>> import torch
    >>> from funshampoo import trace
    >>> tx, params = trace(0.9), {"w": torch.zeros(2)}
    >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params))
    >>> load_state_dict(tx.init(params), state_dict(state)).state
    TraceState(buffer={'w': tensor([1., 1.])}, seen=())
    """
    _check_format(saved)
    template = state_dict(state)
    saved = _repacked(saved, template)
    missing = [name for name in template if name not in saved]
    foreign = [name for name in saved if name not in template and name != FORMAT_KEY]
    elsewhere = dict.fromkeys(_elsewhere(state), False)  # blocks of other ranks: are they there?
    unknown = []
    for name in foreign:
        owner = next((prefix for prefix in _prefixes(name) if prefix in elsewhere), None)
        if owner is None:
            unknown.append(name)
        else:
            elsewhere[owner] = True
    missing += [f"{prefix}/..." for prefix, there in elsewhere.items() if not there]
    misfits = [
        problem
        for name, x in template.items()
        if name in saved and (problem := _misfit(name, x, saved[name], cast))
    ]
    if misfits or (strict and (missing or unknown)):
        raise ValueError(_report(misfits, missing if strict else [], unknown if strict else []))
    names = _Names()

    def filled(place: Place, x: Tensor) -> Tensor:
        wanted = [
            ("/".join(filter(None, [owner, rest])), old)
            for owner, rest, old in names.parts(place, x)
        ]
        if not wanted:
            return x
        if place.stack is None or x.ndim == 0:  # one for all blocks of a stack: whose is there
            found = next((saved[name] for name, _ in wanted if name in saved), x)
            return found.detach().to(x, copy=True)
        new = torch.empty_like(x, memory_format=torch.contiguous_format)
        for row, (name, old) in zip(new, wanted):
            row.copy_(saved.get(name, old))
        return new

    return Loaded(map_tensors(filled, state), missing, unknown)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several ranks saved, as one checkpoint: of `state_dict`, or of the wrapper's.

    Raises:
        ValueError: two parts have different values under one name; says which.

    >>> import torch
    >>> sorted(merged([{"a": torch.ones(1), "n": torch.tensor(3)}, {"n": torch.tensor(3)}]))
    ['a', 'n']
    """
    together: dict[str, Any] = {}
    for part in parts:
        _merge(together, part, "")
    return together


def _merge(together: dict[Any, Any], part: Mapping[Any, Any], path: str) -> None:
    for name, x in part.items():
        known = together.get(name)
        if isinstance(x, Mapping):
            _merge(together.setdefault(name, {}), x, f"{path}{name}/")
        elif name in together and not _identical(known, x):
            raise ValueError(
                f"'{path}{name}' differs between the parts: they were not saved at the same step "
                "of the same training."
            )
        else:
            together[name] = x


class _Names:
    """The names of a state's tensors. Remembers what it has read from a layout."""

    def __init__(self) -> None:
        self._blocks: dict[int, dict[str, dict[int, tuple[str, str]]]] = {}

    def parts(self, place: Place, x: Tensor) -> list[tuple[str, str, Tensor]]:
        """(parameter, rest of the name, view) for every block in a tensor, or for the tensor."""
        if place.path[-2:] == ("sharded", "report"):  # which steps derive anew
            return []
        path = "/".join(place.path) or "state"
        if place.stack is None:
            return [(".".join(place.leaf), path, x)]
        if id(place.layout) not in self._blocks:
            self._blocks[id(place.layout)] = block_names(place.layout)
        blocks = self._blocks[id(place.layout)][place.stack]
        rows = place.rows or ()
        if x.ndim and x.shape[0] != len(rows):
            raise ValueError(
                f"'{path}' has shape {tuple(x.shape)} for the {len(rows)} blocks of stack "
                f"'{place.stack}': in block space the first axis counts blocks. The members of an "
                "ensemble (vmap) are saved one by one, or all together by torch.save."
            )
        values = x.unbind(0) if x.ndim else [x] * len(rows)
        return [
            (blocks[row][0], f"{blocks[row][1]}/{path}", value) for row, value in zip(rows, values)
        ]


def _elsewhere(state: Any) -> list[str]:
    """What other ranks own: names such as "conv1.weight/block_0_1", or of leaves."""
    found: list[str] = []
    layout: Mapping[str, Any] = {}
    scope: tuple[str, ...] | None = None
    for path, node in walk(state):
        if isinstance(node, BlockedState):
            layout, scope = node.layout, path
        elif isinstance(node, ShardedState) and scope is not None and path[: len(scope)] == scope:
            for parameter, stack, span in spans_of(layout):
                own = set(rows_of(node.owned.get(stack, {})))
                rows = zip(range(span.first, span.last), span.blocks())
                found += [f"{parameter}/{block}" for row, block in rows if row not in own]
        elif isinstance(node, ShardedState):
            found += [leaf for leaf, where in node.owned.items() if "elsewhere" in where]
    return found


def _prefixes(name: str) -> list[str]:
    """The beginnings of a name: "w" and "w/block_0" of "w/block_0/buffer"."""
    steps = name.split("/")
    return ["/".join(steps[:i]) for i in range(1, len(steps))]


def _check_format(saved: Mapping[str, Tensor]) -> None:
    version = saved.get(FORMAT_KEY)
    if version is None:
        raise ValueError(
            f"this is no checkpoint of funshampoo: it lacks '{FORMAT_KEY}'. Pass what "
            "funshampoo.state.state_dict returned."
        )
    if int(version) != FORMAT:
        raise ValueError(
            f"the checkpoint has format {int(version)}; this release of funshampoo reads {FORMAT}."
        )


def _repacked(saved: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with symmetric matrices in the form, packed or not, that the state has."""
    return {
        name: in_form_of(x, template[name]) if name in template and _is_symmetric(name) else x
        for name, x in saved.items()
    }


def _is_symmetric(name: str) -> bool:
    """Whether it may be packed: a factor matrix, ".../factors/0", or kept, ".../kept/0/value/0"."""
    return ["", *name.split("/")][-2] in ("factors", "value")


def _misfit(name: str, x: Tensor, saved: Tensor, cast: bool) -> str:
    if saved.shape != x.shape:
        return f"'{name}' has shape {tuple(saved.shape)} there and {tuple(x.shape)} here"
    both_float = saved.is_floating_point() and x.is_floating_point()
    if saved.dtype != x.dtype and not (cast and both_float):
        remedy = "; cast=True converts it" if both_float else ""
        return f"'{name}' is {saved.dtype} there and {x.dtype} here{remedy}"
    return ""


def _report(misfits: list[str], missing: list[str], unknown: list[str]) -> str:
    lines = ["the checkpoint does not fit the state; nothing was changed."]
    for title, names in (
        ("does not fit", misfits),
        ("missing from the checkpoint", missing),
        ("unknown to the state", unknown),
    ):
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
            lines.append(f"{title}: {', '.join(names[:10])}{more}")
    if any("/block" in name for name in (*misfits, *missing, *unknown)):
        lines.append(
            "Blocks of other shapes or names come from another max_size, merge or keep: build the "
            "chain with those of the checkpoint."
        )
    if missing or unknown:
        lines.append("strict=False loads what fits and reports the rest.")
    return "\n".join(lines)


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and bool(((a == b) | ((a != a) & (b != b))).all())
