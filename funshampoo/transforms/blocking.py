"""Block space: run a transformation on stacks of equal blocks instead of on parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.base import GradientTransformation, Tree, as_transformation
from funshampoo.checks import check_choice, check_count
from funshampoo.combine import Mask
from funshampoo.state.places import Path, Place, is_shared, map_tensors, rows_of
from funshampoo.state.stages import BlockedState, ShardedState
from funshampoo.transforms.layout import (
    Layout,
    Merge,
    ParameterLayout,
    Region,
    Stack,
    layout_of,
    leaf_key,
)
from funshampoo.tree import (
    broadcast_prefix,
    check_parameters,
    check_same_structure,
    compute_dtype,
    flatten,
    leaf_names,
)


def blocked(
    inner: GradientTransformation,
    max_size: int | None = 1024,
    *,
    merge: Merge = "small",
    keep: int = 2,
    with_params: bool | Mask = False,
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
            rest).
        keep: "small" stops merging when this many sides are left. At 2 matrices stay matrices; at 1
            a 32×32 matrix becomes a 1024-vector, whose factor matrix is 1024×1024.
        with_params: also hand `inner` the parameters in stacks (a copy more a step). A mask (a tree
            of bools, a prefix of one, or a function of the parameters) gives zeros for the others,
            so that they do not decay.

    Half-precision gradients enter the stacks as float32 and the updates leave in float32. Empty
    parameters have no block. A gradient that is None leaves the state of that parameter's blocks as
    it is, and its update is None.

    State: `BlockedState`.

    Raises:
        ValueError: an argument out of range; blocked inside blocked; from update, gradients whose
            shapes differ from those that init saw (names the leaf).

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
    check_choice("merge", merge, ("none", "small", "matrix"))
    check_count("keep", keep)

    def find_layout(leaves: list[Tensor]) -> Layout:
        return layout_of(tuple(map(leaf_key, leaves)), max_size, merge, keep)

    def init(params: Tree, *, block_ndim: int = 0, **context: Any) -> BlockedState:
        check_parameters(params, "blocked")
        if block_ndim:
            raise ValueError("blocked inside blocked: the parameters are cut into blocks already.")
        leaves, _ = flatten(params)
        layout = find_layout(leaves)
        stacks = stack_blocks(leaves, layout)
        state = inner.init(stacks, block_ndim=1, **context)
        described = copy.deepcopy(layout.described)  # the layout is shared: a state is its owner's
        return BlockedState(state, dict(zip(leaf_names(params), described)))

    def update(
        updates: Tree, state: BlockedState, params: Tree = None, **context: Any
    ) -> tuple[Tree, BlockedState]:
        if params is not None:
            check_same_structure(params, updates, "params", "gradients")
        leaves, spec = flatten(updates)
        missing = [i for i, leaf in enumerate(leaves) if leaf is None]
        if with_params is not False and params is None:
            raise ValueError("blocked(..., with_params=True) needs them: pass params to update.")
        if missing and params is None:
            raise ValueError(_shape_unknown(updates))
        # The parameters' dtype rules: a gradient of another one is cast as it enters its stack.
        layout = find_layout(leaves if params is None else flatten(params)[0])
        _check_layout(layout, state.layout, updates)
        # Directly inside, `sharded` needs the rows that this rank owns; the others are not copied.
        owned = state.inner.owned if isinstance(state.inner, ShardedState) else None
        stacks = stack_blocks(leaves, layout, owned)
        if owned is not None:
            context["stacks"] = layout.stacks
        kept = _saved_rows(state, layout, missing) if missing else {}
        context |= {"gradient": stacks, "block_ndim": 1, "layout": state.layout}
        context |= {"block_ids": _block_ids(layout)}
        if missing:
            context["absent"] = _rows_of(layout, missing)
        shown = None if with_params is False else _shown(params, with_params)
        inner_params = None if shown is None else stack_blocks(shown, layout, owned)
        stacks, inner_state = inner.update(stacks, state.inner, inner_params, **context)
        if missing:
            inner_state = _restored_rows(BlockedState(inner_state, state.layout), kept)
            if is_shared(state):
                # The owner of a block decides for all ranks whether it had a gradient.
                leaves = flatten(params)[0]
        pieces = unstack_blocks(stacks, layout, leaves)
        return spec.unflatten(pieces), BlockedState(inner_state, state.layout)

    return GradientTransformation(init, update)


def stack_blocks(
    leaves: list[Tensor | None], layout: Layout, owned: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Gather leaves in stacks, {name: (rows, *block)}; None fills its rows with zeros.

    With `owned`, {name: {"first:last": ()}}, only those rows of those stacks. A stack of one region
    may be a view of the leaf: stages read their updates and never write them.
    """
    wanted = {name: range(stack.rows) for name, stack in layout.stacks.items()}
    if owned is not None:
        held = {name: rows_of(spans) for name, spans in owned.items() if name in wanted}
        wanted = {name: range(rows[0], rows[-1] + 1) for name, rows in held.items()}
    pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for leaf, where in zip(leaves, layout.parameters):
        for region in where.regions:
            rows = wanted.get(region.stack, range(0))
            first = max(rows.start - region.first, 0)
            last = min(rows.stop - region.first, region.rows)
            if first < last:
                pieces[region.stack].append(_cut_rows(leaf, where, region, layout, first, last))
    return {name: _joined(parts, layout.stacks[name]) for name, parts in pieces.items()}


def _cut_rows(
    leaf: Tensor | None,
    where: ParameterLayout,
    region: Region,
    layout: Layout,
    first: int,
    last: int,
) -> Tensor:
    """The rows first..last-1 of a region, from no more of it than they lie in."""
    if last - first == region.rows:
        return _cut_out(leaf, where, region, layout)
    across = region.rows // region.grid[0]  # blocks in one slice of the grid along the first side
    top, bottom = first // across, -(-last // across)
    part = region._replace(
        grid=(bottom - top, *region.grid[1:]),
        offset=(region.offset[0] + top * region.block[0], *region.offset[1:]),
    )
    cut = _cut_out(leaf, where, part, layout)
    cut = cut if cut.ndim > len(region.block) else cut.unsqueeze(0)
    return cut.narrow(0, first - top * across, last - first)


def _joined(parts: list[Tensor], stack: Stack) -> Tensor:
    """One stack of its pieces, each one block or a row of blocks: one operator where it can be."""
    order = len(stack.block)
    if len(parts) == 1:
        return parts[0] if parts[0].ndim > order else parts[0].unsqueeze(0)
    if all([part.ndim == order for part in parts]):
        return torch.stack(parts)
    return torch.cat([part if part.ndim > order else part.unsqueeze(0) for part in parts])


def unstack_blocks(
    stacks: Mapping[str, Tensor], layout: Layout, leaves: list[Tensor | None]
) -> list[Tensor | None]:
    """Put the blocks of every parameter back together; None where the leaf is None."""
    # Every stack is split once, into its regions in the order in which they were laid out.
    sizes: dict[str, list[int]] = {name: [] for name in layout.stacks}
    for where in layout.parameters:
        for region in where.regions:
            sizes[region.stack].append(region.rows)
    pieces = {name: iter(_parted(stacks[name], rows)) for name, rows in sizes.items()}
    return [
        _assemble([_paste(next(pieces[r.stack]), r) for r in where.regions], where, leaf)
        for leaf, where in zip(leaves, layout.parameters)
    ]


def _parted(stack: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """The regions' rows, (rows, *block), or the block itself where each region has just one."""
    return stack.unbind(0) if all([n == 1 for n in rows]) else torch.split(stack, rows)


def _cut_out(leaf: Tensor | None, where: ParameterLayout, region: Region, layout: Layout) -> Tensor:
    """One region as (rows, *block): slice, split every side into (grid, block), grid axes first.

    A parameter that is one block is (*block) instead.
    """
    stack = layout.stacks[region.stack]
    if leaf is None:
        return torch.zeros(region.rows, *region.block, dtype=stack.dtype, device=stack.device)
    if region.block == where.merged:
        return _reshaped(leaf, region.block).to(stack.dtype)
    x = leaf.reshape(where.merged)
    split: list[int] = []
    for axis, (count, size, start) in enumerate(zip(region.grid, region.block, region.offset)):
        x = x.narrow(axis, start, count * size)
        split += (count, size)
    order = len(region.block)
    axes = [*range(0, 2 * order, 2), *range(1, 2 * order, 2)]
    return x.reshape(split).permute(axes).reshape((region.rows, *region.block)).to(stack.dtype)


def _paste(rows: Tensor, region: Region) -> Tensor:
    """Undo `_cut_out`: (rows, *block) to the region of the merged parameter."""
    if region.rows == 1:
        return _reshaped(rows, region.block)
    order = len(region.block)
    axes = [axis for i in range(order) for axis in (i, order + i)]
    sides = [count * size for count, size in zip(region.grid, region.block)]
    return rows.reshape((*region.grid, *region.block)).permute(axes).reshape(sides)


def _assemble(pieces: list[Tensor], where: ParameterLayout, leaf: Tensor | None) -> Tensor | None:
    """Join the regions of a parameter side by side, last axis first."""
    if leaf is None:
        return None
    if not pieces:
        return torch.zeros_like(leaf, dtype=compute_dtype(leaf))
    for axis in range(len(where.parts) - 1, -1, -1):
        n = where.parts[axis]
        if n > 1:
            pieces = [torch.cat(pieces[i : i + n], axis) for i in range(0, len(pieces), n)]
    return _reshaped(pieces[0], where.shape)


def _reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x.reshape(shape), without an operator where it has that shape."""
    return x if x.shape == shape else x.reshape(shape)


def _check_layout(layout: Layout, expected: Mapping[str, Any], updates: Tree) -> None:
    """The gradients fall into the rows that init laid out."""
    if list(expected.values()) == layout.described:
        return
    if torch.compiler.is_compiling():
        raise ValueError("the gradients do not fit the state: init saw other parameters.")
    names = leaf_names(updates)
    found = dict(zip(names, layout.described))
    if found == dict(expected):  # the same, after something has sorted the keys
        return
    for name, where in zip(names, layout.parameters):
        if found[name] != expected.get(name):
            raise ValueError(
                f"the gradient of '{name}', shape {where.shape}, does not fit the state: init saw "
                "another shape or dtype there. Call init again for a changed model; pass params to "
                "update where gradients have another dtype than their parameters."
            )
    missing = sorted(set(expected) - set(names))
    raise ValueError(f"the gradients lack '{missing[0]}', for which the state has blocks.")


def _shape_unknown(updates: Tree) -> str:
    names = [n for n, u in zip(leaf_names(updates), flatten(updates)[0]) if u is None]
    return f"the gradient of '{names[0]}' is None and its shape unknown: pass params to update."


def _block_ids(layout: Layout) -> dict[str, range]:
    """A number for every block, counted through the stacks."""
    ids: dict[str, range] = {}
    first = 0
    for name, stack in layout.stacks.items():
        ids[name] = range(first, first + stack.rows)
        first += stack.rows
    return ids


def _shown(params: Tree, mask: bool | Mask) -> list[Tensor | None]:
    """The parameters that the inner transformation may see; None hides one."""
    leaves, _ = flatten(params)
    flags = broadcast_prefix(mask(params) if callable(mask) else mask, params, "with_params")
    return [p if flag else None for p, flag in zip(leaves, flags)]


def _rows_of(layout: Layout, parameters: list[int]) -> dict[str, set[int]]:
    """{stack: the rows that belong to these parameters}."""
    rows: dict[str, set[int]] = {}
    for i in parameters:
        for region in layout.parameters[i].regions:
            span = range(region.first, region.first + region.rows)
            rows.setdefault(region.stack, set()).update(span)
    return rows


_Kept = dict[tuple[Path, str | None], tuple[Tensor, Tensor]]  # {place: (rows, their values)}


def _saved_rows(state: BlockedState, layout: Layout, missing: list[int]) -> _Kept:
    """Copies of the rows of parameters without a gradient, from every per-block tensor."""
    wanted = _rows_of(layout, missing)
    kept: _Kept = {}

    def save(place: Place, x: Tensor) -> Tensor:
        if place.stack in wanted and x.ndim > 0:
            held = enumerate(place.rows or ())
            rows = [i for i, row in held if row in wanted[place.stack]]
            index = torch.tensor(rows, dtype=torch.int64, device=x.device)
            kept[place.path, place.stack] = index, x.index_select(0, index)
        return x

    map_tensors(save, state)
    return kept


def _restored_rows(state: BlockedState, kept: _Kept) -> Any:
    """The inner state with the saved rows put back."""

    def restore(place: Place, x: Tensor) -> Tensor:
        found = kept.get((place.path, place.stack))
        return x if found is None else x.index_copy(0, *found)

    return map_tensors(restore, state).inner
