"""Block space: run a transformation on stacks of equal blocks instead of on parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.copies import Given, Traced, Views
from funshampoo.blocks.executor import Executor, Leaves, Put
from funshampoo.blocks.layout import Layout, LeafKeys, Merge, layout_of, leaf_keys
from funshampoo.blocks.portions import TileSize
from funshampoo.blocks.stacks import rows_alive, stack_blocks
from funshampoo.combinators.failures import FailureLimitError, failing_blocks, failure_limit_error
from funshampoo.combinators.masks import Mask, bools_of
from funshampoo.core.applying import add_in_place, apply_of
from funshampoo.core.checks import check_choice, check_count
from funshampoo.core.clock import advanced, running, started
from funshampoo.core.context import Context, changed, with_cut
from funshampoo.core.contract import GradientTransformation, Tree, as_transformation
from funshampoo.core.fit import Entered
from funshampoo.core.misfit import misfit
from funshampoo.core.modes import is_plain, is_traced, lie_apart
from funshampoo.core.needs import without_parameters
from funshampoo.core.parameters import (
    UnfitLeafError,
    check_gradients,
    check_local,
    detached_parameters,
)
from funshampoo.core.placed import (
    all_placed_like,
    any_in_parts,
    is_in_parts,
    local_parts,
    parts_like,
)
from funshampoo.core.traced_tree import TracedSpec
from funshampoo.core.traits import JUDGES, OF_SIDES, refuse, with_traits, without
from funshampoo.core.tree import check_same_structure, flatten, leaf_names, names_in
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
    """Cut every parameter into blocks, and run `inner` on stacks of equal blocks.

    A stack has the shape (number of blocks, *block shape) and holds the blocks of one shape, dtype
    and device from all parameters, so that every stage of `inner` works on a few large tensors. The
    state stays in stacks; the updates are put back together. Inside, `gradient` is the tree of
    stacks and `block_ndim` is 1.

    Args:
        inner: a transformation whose state is per block: tensors with a leading block axis, in
            dicts keyed by stack, and 0-dimensional tensors.
        max_size: longest side of a block; None does not cut.
        merge: how sides are merged before the cut, see `merged_shape`: "none", "small" (multiply
            neighbours while the product stays ≤ max_size), "matrix" (keep the first side, fold the
            rest), or a function of the shape.
        keep: "small" stops merging when this many sides are left. At 2 matrices stay matrices; at 1
            a 32×32 matrix becomes a 1024-vector, whose factor matrix is 1024×1024.
        with_params: also pass the parameters to `inner`, in stacks (one more copy per step). A mask
            (a tree of bools, a prefix of one, or a function of the parameters) passes zeros for the
            others, so that they do not decay.
        tile: how many numbers a donated step processes at once, for an `inner` that steps every
            block independently. The recipes use "auto": on a CPU about 2^20 for each of two kernel
            threads or more, up to 2^22 where roots are refreshed; on other devices 2^26. None: all.

    Half-precision gradients enter the stacks as float32 and the updates come out in float32. Empty
    parameters have no block. If a gradient is None, the state of that parameter's blocks stays as
    it is, and its update is None.

    State: `BlockedState`.

    Raises:
        ValueError: an argument out of range; a stage in `inner` computes with all blocks, and there
            are tiles, or would take a hidden weight for zero and change its update by that (a decay
            leaves it alone), and with_params hides some; blocked inside blocked; from update,
            gradients whose shapes, names or order differ from what init saw (names the leaf).

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
    if tile is not None:
        apart = "with tile, it would see some of the blocks: put it before or behind blocked(...)."
        refuse(inner, "blocked", couples=apart)
    if not isinstance(with_params, bool):
        zeros = "it would get zeros in the place of the weights that a mask in with_params hides."
        refuse(inner, "blocked", weighs=zeros)

    def layout(keys: LeafKeys) -> Layout:  # a closure: to torch.compile its numbers are fixed
        return layout_of(keys, max_size, merge, keep)

    blocks = _Blocked(inner, layout, with_params, tile)
    found = GradientTransformation(
        blocks.init,
        blocks.update,
        "blocked",
        apply=apply_of(blocks.update),
        check=blocks.check if inner.checks else None,
        parts={"inner": inner},
        needs_params=with_params is not False,
        casts=True,  # as they enter their stacks, a portion at a time
        # It opens a scope, whose gradient is the incoming updates.
        flops=lambda block, kept, apart: inner.flops(block, kept) - inner.flops(block, kept, apart),
    )
    found.traits = without(found.traits, JUDGES)
    return with_traits(found, OF_SIDES)


@dataclass(frozen=True)
class _Blocked:
    """`blocked` with its arguments."""

    inner: GradientTransformation
    layout: Callable[[LeafKeys], Layout]
    with_params: bool | Mask
    tile: TileSize = field(repr=False)  # ranks may have their own
    executors: dict[int, Executor] = field(default_factory=dict, repr=False)

    def init(
        self, params: Tree, *, block_ndim: int = 0, clock: bool = False, **context: Any
    ) -> BlockedState:
        inner = self.inner
        in_parts = inner.spread is not None and any_in_parts(flatten(params)[0])
        check_local(params, "blocked", parts=in_parts)
        if block_ndim:
            raise ValueError("blocked inside blocked: the parameters are cut into blocks already.")
        leaves, _ = flatten(params)
        layout, names = self.layout(leaf_keys(leaves)), leaf_names(params)
        context |= {"block_ndim": 1, "clock": clock or inner.counts}
        try:
            if in_parts:
                state = inner.spread.begin(Leaves(names, leaves, leaves, layout), **context)
            else:
                state = inner.init(stack_blocks(detached_parameters(leaves), layout), **context)
        except UnfitLeafError as error:  # only here is a stack's parameter known
            own = [n for n, where in zip(names, layout.described) if error.leaf in where]
            raise UnfitLeafError(error.text, own[0] if own else error.leaf) from None
        described = copy.deepcopy(layout.described)  # layouts are shared, states are not
        return BlockedState(state, dict(zip(names, described)), started(inner.counts, clock))

    def _read(self, updates: Tree, state: BlockedState, params: Tree, entered: Any) -> Given:
        leaves, known, spec, keys = _leaves_of(updates, params, entered)
        missing = [i for i, leaf in enumerate(leaves) if leaf is None]
        if self.with_params is False and self.inner.needs:
            raise without_parameters(self.inner.needs, block_ndim=1)
        if self.with_params is not False and params is None:  # from `run`, which is unchecked
            raise without_parameters("blocked", block_ndim=0)
        # The parameters' dtype is used: a gradient of another one is cast as it enters its stack.
        layout = self.layout(keys)
        called = [] if isinstance(spec, TracedSpec) else names_in(spec)
        _check_layout(layout, state, called, "gradients" if params is None else "parameters")
        shown = None if self.with_params is False else _shown(params, self.with_params)
        return Given(leaves, known, spec, layout, missing, shown, called, params is not None)

    def _inside(self, given: Given, state: BlockedState, context: Context) -> Context:
        inside = running(state.steps, context)
        if inside.extra and not any_in_parts(given.known):
            known = given.spec.unflatten(given.known)
            inside = with_cut(inside, known, lambda x: stack_blocks(flatten(x)[0], given.layout))
        if inside.alive is None:
            return inside
        return changed(inside, alive=rows_alive(inside.alive, given.layout))

    def update(
        self,
        updates: Tree,
        state: BlockedState,
        params: Tree,
        context: Context,
        *,
        in_place: bool = False,
    ) -> tuple[Tree, BlockedState]:
        given, inner = self._read(updates, state, params, context.entered), self.inner
        here, own, said = self._inside(given, state, context), given.known, given.described
        run, missing = self._executor(given.layout), given.missing_rows()
        found: list[Any] = []
        if any_in_parts(own):
            leaves = said()._replace(gradients=all_placed_like(given.leaves, own))
            new, parts = run.run_parts(inner.spread, state.inner, missing, here, leaves)
            if in_place:  # the update is added there, without DTensors around it
                held = local_parts(own)
                add_in_place(held, [u.view(p.shape) for p, u in zip(held, parts)])
            else:
                found = parts_like(own, parts)
                for i in given.missing:
                    if is_in_parts(own[i]):  # so its gradient is missing on all ranks
                        found[i] = None
        elif in_place and self._may_add(own):
            put: Put = functools.partial(run.parts.scatter_add, leaves=own)
            gather = Views(run.parts, given).gather
            new = run.run(inner, state.inner, gather, put, missing, here, said)
        else:
            shared = inner.spread is not None and inner.spread.is_shared()
            plain = is_plain([g for g in given.leaves if g is not None], own)
            copies = Views(run.parts, given, copies=shared) if plain else Traced(given)
            new = run.run(inner, state.inner, copies.gather, copies.put, missing, here, said)
            found = copies.updates(shared)
            if in_place:
                add_in_place(own, found)
        out = None if in_place else given.spec.unflatten(found)
        return out, BlockedState(new, state.layout, advanced(state.steps, context.donate))

    def _executor(self, layout: Layout) -> Executor:
        """That of a recent layout; layouts are cached, so they are known by identity."""
        if torch.compiler.is_dynamo_compiling():
            return Executor(layout, self.tile)
        found = self.executors.get(id(layout))  # which keeps its layout alive, but for a deepcopy's
        if found is None or found.layout is not layout:
            if len(self.executors) > 8:
                self.executors.clear()
            found = self.executors[id(layout)] = Executor(layout, self.tile)
        return found

    def _may_add(self, own: list[Tensor]) -> bool:
        """Whether blocks may be added to these parameters one after the other."""
        if is_traced() or not all([p.is_contiguous() for p in own]):
            return False
        # With tied parameters, a tile would read what the previous one has written.
        return self.with_params is False or lie_apart(own)

    def check(self, state: BlockedState, context: Context) -> None:
        here = running(state.steps, context)
        try:
            self.inner.check(state.inner, here)
        except FailureLimitError as error:  # only here do the blocks have names
            blocks = error.everywhere(failing_blocks(state, error.max_failures))
            raise failure_limit_error(blocks, error.max_failures) from None


def _leaves_of(
    updates: Tree, params: Tree, entered: Entered | None
) -> tuple[list[Any], list[Any], Any, LeafKeys]:
    """(gradients, parameters, their structure, the properties that the layout depends on)."""
    if entered and entered.alike and entered.has(updates, params):
        return entered.gradients, entered.known, entered.looks.spec, tuple(entered.looks.leaves)
    if params is None:
        leaves, spec = flatten(updates)
        known = leaves
        if any([leaf is None for leaf in leaves]):
            first = next(n for n, leaf in zip(leaf_names(updates), leaves) if leaf is None)
            raise shape_unknown(first)
    else:
        (known, _), (leaves, spec) = check_same_structure(params, updates, "gradients")
    check_gradients(leaves, known, updates)  # also for an earlier stage's updates
    return leaves, known, spec, leaf_keys(known)


def _check_layout(layout: Layout, state: BlockedState, names: Sequence[str], given: str) -> None:
    """Check that gradients have the rows that init laid out for parameters of the same names."""
    if not names:  # in torch.compile
        if list(state.layout.values()) != layout.described:
            raise ValueError("the gradients do not fit the state: init saw other parameters.")
        return
    wanted = BlockedState((), dict(zip(names, layout.described)))
    if wanted.layout != state.layout:  # by name: a checkpoint may have sorted the keys
        raise ValueError(misfit(wanted, state, (), given))


def shape_unknown(name: str) -> ValueError:
    """The error if a gradient is None, and there is no parameter that has its shape."""
    return ValueError(
        f"the gradient of '{name}' is None and its shape unknown: pass params to update."
    )


def _shown(params: Tree, mask: bool | Mask) -> list[Tensor | None]:
    """The parameters that the inner transformation may read; None hides one."""
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
    return found[0].layout(leaf_keys(flatten(params)[0]))


def shows_parameters(transformation: GradientTransformation) -> bool:
    """Whether a `blocked` in it passes parameters to the stages inside."""
    return any(found.with_params is not False for found in _blocked_in(transformation))


def _blocked_in(transformation: GradientTransformation) -> Iterator[_Blocked]:
    own = getattr(transformation._given["init"], "__self__", None)
    if isinstance(own, _Blocked):
        yield own
    for part in transformation.parts.values():
        yield from _blocked_in(part)
