"""The place of every tensor in a state: its stage, leaf or block, and rows of a stack.

A state is a pytree that describes itself. Combinators are named tuples with another state in the
field `inner` (`graft`: in `direction` and `onto`); dicts in such a field belong to chains and
partitions, keyed by stage; any other dict is a tree over the parameters or, in block space, over
the stacks, and so is a named tuple in any other field except one of `stages`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.context import changed
from funshampoo.core.traced_tree import dict_like
from funshampoo.state.meaning import is_declared
from funshampoo.state.nodes import walk
from funshampoo.state.stages import (
    OF_PARAMETERS,
    BlockedState,
    Kept,
    PartitionState,
    ShardedState,
    WrappedState,
)

Path = tuple[str, ...]


class Span(NamedTuple):
    """Consecutive rows of a stack, and the grid of a parameter's blocks that they hold.

    Attributes:
        first, last: the rows first..last-1.
        grid: blocks along every side, row-major in the rows.
        origin: the coordinates of the first block among all blocks of the parameter.
        stacked: the side of the grid that counts matrices of a stack; blocks omit it.

    >>> span = Span(4, 10, (2, 3), (0, 1))
    >>> str(span), Span.parse("4:10 2x3+0,1") == span
    ('4:10 2x3+0,1', True)
    >>> str(Span(0, 8, (8, 1, 1), (0, 0, 0), 0)), Span.parse("0:8 8*x1x1+0,0,0").stacked
    ('0:8 8*x1x1+0,0,0', 0)
    >>> span.blocks()
    ['block_0_1', 'block_0_2', 'block_0_3', 'block_1_1', 'block_1_2', 'block_1_3']
    """

    first: int
    last: int
    grid: tuple[int, ...]
    origin: tuple[int, ...]
    stacked: int | None = None

    def __str__(self) -> str:
        marks = ["*" if i == self.stacked else "" for i in range(len(self.grid))]
        grid = "x".join([f"{n}{mark}" for n, mark in zip(self.grid, marks)])
        return f"{self.first}:{self.last} {grid}+{','.join(map(str, self.origin))}"

    @classmethod
    def parse(cls, text: str) -> Span:
        """Parse a span written by `str`."""
        rows, place = text.split(" ")
        first, last = map(int, rows.split(":"))
        grid, origin = [list(filter(None, p.split(by))) for p, by in zip(place.split("+"), "x,")]
        stacked = next((i for i, side in enumerate(grid) if side.endswith("*")), None)
        sides = tuple([int(side.removesuffix("*")) for side in grid])
        return cls(first, last, sides, tuple(map(int, origin)), stacked)

    def block(self, stack: str) -> tuple[int, ...]:
        """The shape of a block of this stack in the parameter, or in one of its stacked matrices.

        >>> Span.parse("0:8 8*x1x1+0,0,0").block("4x2"), Span.parse("0:1 1x1+0,0").block("4x2")
        ((1, 4, 2), (4, 2))
        """
        sides = block_of(stack)
        at = self.stacked
        return sides if at is None else (*sides[:at], 1, *sides[at:])

    def blocks(self) -> list[str]:
        """The names of the blocks, one per row; a parameter of order 0 has only block "block"."""
        return ["_".join(["block", *map(str, at)]) for at in self.coordinates()]

    def coordinates(self) -> list[tuple[int, ...]]:
        """The coordinates of the blocks among all of the parameter, one per row."""
        sides = [range(o, o + n) for o, n in zip(self.origin, self.grid)]
        return list(itertools.product(*sides))


class Place(NamedTuple):
    """The place of one tensor in a state.

    Attributes:
        stage: names of the enclosing stages; in `graft` also "direction" and "onto".
        path: names of the enclosing stages and fields, without the fields `inner` of combinators,
            the leaf and the stack. A combinator's own fields are preceded by its name.
        leaf: path of the leaf in the tree of parameters; outside block space.
        stack: name of the stack, in block space.
        rows: in block space, the row of the full stack for every row that the state holds; None if
            that is not known or there is no stack.
        layout: that of the enclosing `BlockedState`; empty outside block space.
        blocks: `block_names` of it, once someone has asked for `owners`.
        kind: the class of the innermost enclosing named tuple.
        field: the name of its field that contains the tensor.
    """

    stage: Path
    path: Path
    leaf: Path
    stack: str | None
    rows: tuple[int, ...] | None
    layout: Mapping[str, Any]
    kind: type | None
    field: str = ""
    blocks: dict[str, dict[int, tuple[str, str]]] = {}  # noqa: RUF012, of a layout its own

    def owners(self) -> list[tuple[str, str]]:
        """(parameter, block) of every row held there; none outside block space."""
        if self.stack is None:
            return []
        if not self.blocks:
            self.blocks.update(block_names(self.layout))
        return [self.blocks[self.stack][row] for row in self.rows or ()]


class _Scope(NamedTuple):
    """The context on the way down to a tensor."""

    place: Place
    stacks: Mapping[str, tuple[int, ...] | None] | None  # in block space: {stack: rows}
    of_states: bool  # whether a dict here is keyed by stages
    only: Collection[str] | None  # stacks to keep; None: all


def map_tensors(
    function: Callable[..., Any],
    *states: Any,
    stacks: Collection[str] | None = None,
    only: Collection[str] | None = None,
) -> Any:
    """Apply `function(place, tensor, *tensors of the other states)` to every tensor of a state.

    Args:
        function: its result replaces the tensor.
        states: of one structure; the result has the first one's tuples and dicts.
        stacks: the names of the stacks, if the states were taken from inside block space.
        only: stacks to keep; entries of others are omitted from the result.
    """
    known = None if stacks is None else dict.fromkeys(stacks, None)
    start = _Scope(Place((), (), (), None, None, {}, None), known, True, only)
    return _map(function, start, states)


def _map(function: Callable[..., Any], scope: _Scope, nodes: tuple[Any, ...]) -> Any:
    node = nodes[0]
    if isinstance(node, Tensor):
        side = scope.place.path[-1:] == ("factors",)
        return function(_side_moved(scope.place) if side else scope.place, *nodes)
    if isinstance(node, dict):
        children = [(key, _below(scope, node, key)) for key in node]
        mapped = {
            key: _map(function, below, tuple([n[key] for n in nodes]))
            for key, below in children
            if scope.only is None or below.place.stack is None or below.place.stack in scope.only
        }
        return dict_like(node, mapped)
    if not isinstance(node, (tuple, list)):
        return node
    fields: tuple[str, ...] | None = getattr(type(node), "_fields", None)
    if fields is None or _is_of_parameters(scope, node):
        parts = zip(fields or range(len(node)), zip(*nodes))
        children = [_map(function, _below(scope, node, key), own) for key, own in parts]
        return type(node)(children) if fields is None else type(node)(*children)
    scope = _entered(scope, node)
    static = _STATIC if isinstance(node, (BlockedState, ShardedState)) else ()

    def inside(name: str) -> Any:
        if name in static:
            return getattr(node, name)
        return _map(function, _inside(scope, node, name), tuple([getattr(n, name) for n in nodes]))

    return type(node)(*[inside(name) for name in fields])


def _is_of_parameters(scope: _Scope, node: Any) -> bool:
    """Whether a named tuple is a container in the tree of parameters, and not a state.

    It is a container if it is in a field of another named tuple that does not hold states.
    """
    in_a_tree = scope.place.kind is not None and not scope.of_states and scope.stacks is None
    return in_a_tree and not (type(node).__module__ == Kept.__module__ or is_declared(type(node)))


def _entered(scope: _Scope, node: Any) -> _Scope:
    """Block space starts at a `BlockedState`; a `ShardedState` in it holds some of the rows."""
    if isinstance(node, BlockedState):
        rows = {stack: tuple(range(n)) for stack, n in stack_rows(node).items()}
        return changed(
            scope, place=changed(scope.place, layout=node.layout, blocks={}), stacks=rows
        )
    if isinstance(node, ShardedState) and scope.stacks is not None:
        return changed(scope, stacks={stack: rows_of(spans) for stack, spans in node.owned.items()})
    if isinstance(node, Kept):
        return changed(scope, place=_side_moved(scope.place))
    return scope


_STATIC = ("layout", "owned", "ranks")  # keys that say what is where, without tensors
_KEYED_BY_NAME = ("inner", "direction", "onto", "hyperparams")


def _inside(scope: _Scope, node: Any, field: str) -> _Scope:
    """The scope of a field of a named tuple."""
    place = changed(scope.place, kind=type(node), field=field)
    if field != "inner":
        place = changed(place, path=(*place.path, *_combinator(node), field))
    if field in ("direction", "onto"):
        place = changed(place, stage=(*place.stage, field))
    return changed(scope, place=place, of_states=field in _KEYED_BY_NAME or _is_own(node, field))


def _is_own(node: Any, field: str) -> bool:
    """Whether a field holds the state of a combinator of a user's, a named tuple."""
    mine = isinstance(node, WrappedState) and field == "own" and hasattr(node.own, "_fields")
    return mine and OF_PARAMETERS not in node.pace


def _combinator(node: Any) -> Path:
    """("guarded",) for a `GuardedState`: its own fields are beside those of the state in it."""
    own = type(node).__name__.removesuffix("State").lower()
    return (own,) if "inner" in type(node)._fields else ()


def _below(scope: _Scope, node: Any, key: Any) -> _Scope:
    """The scope below a key of a dict, or at an index."""
    place, stacks = scope.place, scope.stacks
    over_stacks = isinstance(node, dict) and stacks is not None and node.keys() == stacks.keys()
    over_stacks = over_stacks and place.kind is not PartitionState  # its keys are labels
    if over_stacks and stacks is not None and place.stack is None:
        below = changed(place, stack=str(key), rows=stacks[key])
        return changed(scope, place=below, of_states=False)
    if scope.of_states or stacks is not None or place.kind is Kept:
        place = changed(place, path=(*place.path, str(key)))
        if scope.of_states and place.path[-2:-1] != ("hyperparams",):
            place = changed(place, stage=(*place.stage, str(key)))
        return changed(scope, place=place)
    return changed(scope, place=changed(place, leaf=(*place.leaf, str(key))))


def _side_moved(place: Place) -> Place:
    """The place with a factor's side moved from the leaf's path to the end of the tensor's path."""
    if not place.leaf:
        return place
    return changed(place, path=(*place.path, place.leaf[-1]), leaf=place.leaf[:-1])


def rows_of(spans: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows in keys such as "0:2" or "0:2 2x1+0,0".

    >>> rows_of({"0:2": (), "5:6": ()})
    (0, 1, 5)
    """
    rows: list[int] = []
    for span in spans:
        first, last = span.split(" ")[0].split(":")
        rows += range(int(first), int(last))
    return tuple(rows)


def spans_of(layout: Mapping[str, Any]) -> Iterator[tuple[str, str, Span]]:
    """(parameter, stack, span) for every region of a `BlockedState.layout`."""
    for parameter, stacks in layout.items():
        for stack, spans in stacks.items():
            for span in spans:
                yield parameter, stack, Span.parse(span)


def stack_rows(state: BlockedState) -> dict[str, int]:
    """{stack: its number of blocks}, in the order of the stacks."""
    rows: dict[str, int] = {}
    for _, stack, span in spans_of(state.layout):
        rows[stack] = max(rows.get(stack, 0), span.last)
    return rows


def block_of(stack: str) -> tuple[int, ...]:
    """The block shape in a stack's name.

    >>> block_of("64x147:float32@cuda:0"), block_of("scalar")
    ((64, 147), ())
    """
    sides = stack.split("@")[0].split(":")[0]
    return () if sides == "scalar" else tuple(map(int, sides.split("x")))


def walk_blocks(state: Any) -> Iterator[tuple[Path, Any, BlockedState | None]]:
    """`walk`, with the `BlockedState` around each node, or None; these are never nested."""
    scope: Path = ()
    around: BlockedState | None = None
    for path, node in walk(state):
        if isinstance(node, BlockedState):
            scope, around = path, node
        elif path[: len(scope)] != scope:
            around = None
        yield path, node, around


def is_shared(state: Any) -> bool:
    """Whether other ranks have a part of this state, and wait for this one's updates."""
    shared = [node.ranks for _, node in walk(state) if isinstance(node, ShardedState)]
    return any([not key.endswith(" of 1") for ranks in shared for key in ranks])


def block_names(layout: Mapping[str, Any]) -> dict[str, dict[int, tuple[str, str]]]:
    """{stack: {row: (parameter, block)}}: {"4x4": {0: ("conv1.weight", "block_0_1"), ...}}."""
    names: dict[str, dict[int, tuple[str, str]]] = {}
    for parameter, stack, span in spans_of(layout):
        rows = zip(range(span.first, span.last), span.blocks())
        names.setdefault(stack, {}).update((row, (parameter, block)) for row, block in rows)
    return names
