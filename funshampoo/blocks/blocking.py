"""Block space: run a transformation on stacks of equal blocks instead of on parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.copies import Given, Traced, Views
from funshampoo.blocks.executor import Executors, Leaves
from funshampoo.blocks.layout import Layout, Merge, layout_of, leaf_keys
from funshampoo.blocks.portions import TileSize
from funshampoo.blocks.stacks import rows_alive, stack_blocks
from funshampoo.combinators.failures import FailureLimitError, failing_blocks, failure_limit_error
from funshampoo.combinators.masks import Mask, bools_of
from funshampoo.core.applying import add_in_place
from funshampoo.core.checks import check_choice, check_count
from funshampoo.core.clock import advanced, running, started
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.modes import is_plain, is_traced, lie_apart
from funshampoo.core.needs import without_parameters
from funshampoo.core.parameters import (
    UnfitLeafError,
    check_local,
    detached_parameters,
    problem_of_gradients,
)
from funshampoo.core.placed import (
    all_placed_like,
    any_in_parts,
    is_in_parts,
    local_parts,
    parts_like,
)
from funshampoo.core.tree import check_same_structure, flatten, leaf_names
from funshampoo.state.stages import BlockedState


def blocked(
    inner: GradientTransformation,
    max_size: int | None = 1024,
    *,
    merge: Merge = "small",
    keep: int = 2,
    with_params: bool | Mask = False,
    tile: TileSize = None,
) -> GradientTransformation:
    """Cut every parameter into blocks, run `inner` on stacks of equal blocks, put the pieces back.

    A stack has the shape (number of blocks, *block shape) and holds the blocks of one shape, dtype
    and device from all parameters, so that every stage of `inner` works on a few large tensors.
    The state lives in stacks and stays there. Inside, `gradient` is the tree of stacks and
    `block_ndim` is 1.

    Args:
        inner: a transformation whose state is per block: tensors that lead with the block axis, in
            dicts keyed by stack, and 0-dimensional tensors.
        max_size: longest side of a block; None does not cut.
        merge: how sides are merged before the cut, see `merged_shape`: "none", "small" (multiply
            neighbours while the product stays ≤ max_size), "matrix" (keep the first side, fold the
            rest), or a function of the shape.
        keep: "small" stops merging when this many sides are left. At 2 matrices stay matrices; at 1
            a 32×32 matrix becomes a 1024-vector, whose factor matrix is 1024×1024.
        with_params: also hand `inner` the parameters in stacks (a copy more a step). A mask (a tree
            of bools, a prefix of one, or a function of the parameters) gives zeros for the others,
            so that they do not decay.
        tile: how many numbers a donated step works on at once, for an `inner` that steps every
            block by itself, whatever others there are. The recipes say "auto": on a CPU about
            2^20 for each of two kernel threads or more, up to 2^22 where roots are refreshed; on
            other devices 2^26. None: all.

    Half-precision gradients enter the stacks as float32 and the updates leave in float32. Empty
    parameters have no block. A gradient that is None leaves the state of that parameter's blocks as
    it is, and its update is None.

    State: `BlockedState`.

    Raises:
        ValueError: an argument out of range; blocked inside blocked; from update, gradients whose
            shapes, names or order differ from what init saw (names the leaf).

    Reference: Shi et al., arXiv 2309.06497 (blocking and merging).

    >>> import torch
    >>> from funshampoo import trace
    >>> tx = blocked(trace(0.9), max_size=4, merge="none")
    >>> state = tx.init({"w": torch.zeros(8, 6)})
    >>> {name: tuple(b.shape) for name, b in state.inner.buffer.items()}
    {'4x4': (2, 4, 4), '4x2': (2, 4, 2)}
    >>> state.layout
    {'w': {'4x4': {'0:2 2x1+0,0': ()}, '4x2': {'0:2 2x1+0,1': ()}}}
    """
    inner = as_transformation(inner)
    if max_size is not None:
        check_count("max_size", max_size)
    if not callable(merge):
        check_choice("merge", merge, ("none", "small", "matrix"))
    check_count("keep", keep)
    if tile is not None and tile != "auto":
        check_count("tile", tile)

    def layout(leaves: list[Tensor]) -> Layout:  # a closure: to torch.compile its numbers are fixed
        return layout_of(leaf_keys(leaves), max_size, merge, keep)

    blocks = _Blocked(inner, layout, with_params, Executors(tile), _Names())
    return GradientTransformation(
        blocks.init,
        blocks.update,
        "blocked",
        apply=blocks.apply,
        check=blocks.check if inner.checks else None,
        parts={"inner": inner},
        needs_params=with_params is not False,
        casts=True,  # as they enter their stacks, a portion at a time
        # It opens a scope, whose gradient are the updates that come in.
        flops=lambda block, kept, apart: inner.flops(block, kept) - inner.flops(block, kept, apart),
    )


@dataclass(frozen=True)
class _Blocked:
    """`blocked` with its arguments."""

    inner: GradientTransformation
    layout: Callable[[list[Tensor]], Layout]
    with_params: bool | Mask
    executors: Executors = field(repr=False)
    names: _Names = field(repr=False)

    def init(
        self, params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> BlockedState:
        inner = self.inner
        in_parts = inner.spread is not None and any_in_parts(flatten(params)[0])
        check_local(params, "blocked", parts=in_parts)
        if block_ndim:
            raise ValueError("blocked inside blocked: the parameters are cut into blocks already.")
        leaves, _ = flatten(params)
        layout, names = self.layout(leaves), leaf_names(params)
        context |= {"block_ndim": 1, "clock": clock or inner.counts}
        try:
            if in_parts:
                state = inner.spread.begin(Leaves(names, leaves, leaves, layout), **context)
            else:
                state = inner.init(stack_blocks(detached_parameters(leaves), layout), **context)
        except UnfitLeafError as error:  # only here stacks are parameters
            own = [n for n, where in zip(names, layout.described) if error.leaf in where]
            raise UnfitLeafError(error.text, own[0] if own else error.leaf) from None
        described = copy.deepcopy(layout.described)  # the layout is shared: a state is its owner's
        return BlockedState(state, dict(zip(names, described)), started(inner.counts, clock))

    def _read(self, updates: Tree, state: BlockedState, params: Tree) -> Given:
        if params is None:
            leaves, spec = flatten(updates)
            known = leaves
        else:
            (known, _), (leaves, spec) = check_same_structure(params, updates, "gradients")
        if problem := problem_of_gradients(leaves, known):
            raise TypeError(f"the gradient of '{leaf_names(updates)[problem[0]]}' {problem[1]}.")
        missing = [i for i, leaf in enumerate(leaves) if leaf is None]
        if self.with_params is False and self.inner.needs:
            raise without_parameters(self.inner.needs, block_ndim=1)
        if self.with_params is not False and params is None:  # by `run`, which nobody looks at
            raise without_parameters("blocked", block_ndim=0)
        if missing and params is None:
            raise ValueError(_shape_unknown(updates))
        # The parameters' dtype rules: a gradient of another one is cast as it enters its stack.
        layout = self.layout(known)
        called = [] if torch.compiler.is_dynamo_compiling() else self.names.of(updates, spec)
        _check_layout(layout, state.layout, called)
        shown = None if self.with_params is False else _shown(params, self.with_params)
        return Given(leaves, known, spec, layout, missing, shown, called, params is not None)

    def _inside(self, given: Given, state: BlockedState, context: Context) -> Context:
        inside = running(state.steps, context)
        if inside.alive is None:
            return inside
        return changed(inside, alive=rows_alive(inside.alive, given.layout))

    def update(
        self, updates: Tree, state: BlockedState, params: Tree, context: Context
    ) -> tuple[Tree, BlockedState]:
        given, inner = self._read(updates, state, params), self.inner
        here = self._inside(given, state, context)
        run = self.executors.of(given.layout)
        missing = given.missing_rows()
        if any_in_parts(given.known):
            new, parts = self._on_parts(given, state, here)
            found = parts_like(given.known, parts)
            for i in given.missing:
                if is_in_parts(given.known[i]):  # so on all ranks
                    found[i] = None
        else:
            shared = inner.spread is not None and inner.spread.is_shared()
            plain = is_plain([g for g in given.leaves if g is not None], given.known)
            copies = Views(run.parts, given, copies=shared) if plain else Traced(given)
            gather, put, said = copies.gather, copies.put, given.described
            new = run.run(inner, state.inner, gather, put, missing, here, said)
            found = copies.updates(shared)
        steps = advanced(state.steps, context.donate)
        return given.spec.unflatten(found), BlockedState(new, state.layout, steps)

    def _on_parts(
        self, given: Given, state: BlockedState, here: Context
    ) -> tuple[Any, list[Tensor]]:
        """(new state, what this rank has of the update of every leaf, in any shape)."""
        placed = all_placed_like(given.leaves, given.known)
        leaves = given.described()._replace(gradients=placed)
        run = self.executors.of(given.layout)
        return run.run_parts(self.inner.spread, state.inner, given.missing_rows(), here, leaves)

    def apply(
        self, updates: Tree, state: BlockedState, params: Tree, context: Context
    ) -> BlockedState:
        given, inner = self._read(updates, state, params), self.inner
        own = given.known
        if any_in_parts(own):  # what comes is added where it is, without DTensors around it
            new, parts = self._on_parts(given, state, self._inside(given, state, context))
            held = local_parts(own)
            add_in_place(held, [u.view(p.shape) for p, u in zip(held, parts)])
            return BlockedState(new, state.layout, advanced(state.steps, context.donate))
        in_place = not is_traced() and all([p.is_contiguous() for p in own])
        # Where parameters are tied, a tile would read what the one before has written.
        if not in_place or not (self.with_params is False or lie_apart(own)):
            updates, state = self.update(updates, state, params, context)
            add_in_place(params, updates)
            return state
        here = self._inside(given, state, context)
        run = self.executors.of(given.layout)

        def put(stack: str, rows: range, values: Tensor) -> None:
            run.parts.scatter_add(stack, rows, values, own)

        gather = Views(run.parts, given).gather
        missing = given.missing_rows()
        new = run.run(inner, state.inner, gather, put, missing, here, given.described)
        return BlockedState(new, state.layout, advanced(state.steps, context.donate))

    def check(self, state: BlockedState, context: Context) -> None:
        here = running(state.steps, context)
        try:
            self.inner.check(state.inner, here)
        except FailureLimitError as error:  # only here the blocks have names
            blocks = error.everywhere(failing_blocks(state, error.max_failures))
            raise failure_limit_error(blocks, error.max_failures) from None


class _Names:
    """The names of the leaves of a tree. Those of the last tree are remembered."""

    def __init__(self) -> None:
        self._last: tuple[Any, list[str]] = (None, [])

    def of(self, tree: Tree, spec: Any) -> list[str]:
        seen, names = self._last
        if seen is None or seen != spec:
            names = leaf_names(tree)
            self._last = spec, names
        return names


def _check_layout(layout: Layout, expected: Mapping[str, Any], names: Sequence[str]) -> None:
    """The gradients fall into the rows that init laid out for the parameters of their names."""
    if torch.compiler.is_dynamo_compiling():  # where there are no names
        if list(expected.values()) == layout.described:
            return
        raise ValueError("the gradients do not fit the state: init saw other parameters.")
    found = dict(zip(names, layout.described))
    if found == dict(expected):  # by name: a checkpoint may have sorted the keys
        return
    for name, where in zip(names, layout.parameters):
        if found[name] != expected.get(name):
            raise ValueError(
                f"the gradient of '{name}', shape {where.shape}, does not fit the state: init saw "
                "another shape or dtype there, or parameters of other names or in another order "
                "(an OrderedDict has its own, a dict is sorted). Call init again for a changed "
                "model; pass params to update where gradients have another dtype than their "
                "parameters."
            )
    missing = sorted(set(expected) - set(names))
    raise ValueError(f"the gradients lack '{missing[0]}', for which the state has blocks.")


def _shape_unknown(updates: Tree) -> str:
    names = [n for n, u in zip(leaf_names(updates), flatten(updates)[0]) if u is None]
    return f"the gradient of '{names[0]}' is None and its shape unknown: pass params to update."


def _shown(params: Tree, mask: bool | Mask) -> list[Tensor | None]:
    """The parameters that the inner transformation may see; None hides one."""
    leaves, _ = flatten(params)
    flags = bools_of(mask, params, "with_params")
    return [p if flag else None for p, flag in zip(leaves, flags)]


def layout_in(transformation: GradientTransformation, params: Tree) -> Layout:
    """The layout of the only `blocked` in a chain, for these parameters.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = list(_blocked_in(transformation))
    if len(found) != 1:
        raise ValueError(
            f"transformation contains {len(found)} blocked(...); a plan distributes the blocks of "
            "exactly one."
        )
    return found[0].layout(flatten(params)[0])


def shows_parameters(transformation: GradientTransformation) -> bool:
    """Whether a `blocked` in it hands parameters to the stages inside."""
    return any(found.with_params is not False for found in _blocked_in(transformation))


def _blocked_in(transformation: GradientTransformation) -> Iterator[_Blocked]:
    own = getattr(transformation._given["init"], "__self__", None)
    if isinstance(own, _Blocked):
        yield own
    for part in transformation.parts.values():
        yield from _blocked_in(part)
