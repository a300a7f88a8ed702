"""What is shared out: the stacks of block space, or leaves as stacks of one row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.context import Context, changed
from funshampoo.core.contract import Tree
from funshampoo.core.tree import MaskedNode, compute_dtype, flatten, leaf_names
from funshampoo.distributed.shards import Blocks, Equal, Piece, settled


class Space:
    """Stacks, or leaves as stacks of one row each: what they have in common.

    Args:
        tree: the stacks, or the tree of leaves.
        block_ndim: 1 for stacks.
    """

    def __init__(self, tree: Tree, block_ndim: int) -> None:
        self.in_blocks = block_ndim > 0
        leaves, self.spec = flatten(tree)
        self.names = list(tree) if self.in_blocks else leaf_names(tree)
        leaves = list(tree.values()) if self.in_blocks else leaves
        known = {name: _present(name, x) for name, x in zip(self.names, leaves)}
        self.dtypes = {name: compute_dtype(x) for name, x in known.items()}
        lead = 1 if self.in_blocks else 0
        stacks = {
            name: Equal(tuple(x.shape[lead:]), x.shape[0] if lead else 1)
            for name, x in known.items()
        }
        devices = [x.device for x in known.values()]
        self.all_blocks = settled(stacks, devices, list(self.dtypes.values()), self.in_blocks)

    @property
    def device(self) -> torch.device:
        """Of all."""
        return self.all_blocks.device

    def select(self, tree: Tree, own: Mapping[str, Piece]) -> Tree:
        """What this rank owns of a tree: views of rows; outside block space others are hidden."""
        if self.in_blocks:
            return {s: tree[s].narrow(0, p.first, p.rows) for s, p in own.items()}
        leaves = self.spec.flatten_up_to(tree)
        shown = [x if n in own else MaskedNode() for n, x in zip(self.names, leaves)]
        return self.spec.unflatten(shown)

    def selected_context(self, context: Context, own: Mapping[str, Piece]) -> Context:
        """The context with what of it is over the blocks cut to this rank's."""

        def selected(tree: Tree) -> Tree:
            return None if tree is None else self.select(tree, own)

        rows = context.rows
        if rows is not None:
            rows = {s: rows[s][p.first : p.first + p.rows] for s, p in own.items()}
        gradient, alive = selected(context.gradient), selected(context.alive)
        return changed(context, gradient=gradient, alive=alive, rows=rows)

    def own_updates(self, out: Tree, own: Mapping[str, Piece]) -> dict[str, Tensor | None]:
        """{stack or leaf: update}, of those that this rank owns."""
        if self.in_blocks:
            return dict(out)
        found = zip(self.names, self.spec.flatten_up_to(out))
        return {name: x for name, x in found if name in own}

    def rebuilt(self, pieces: Mapping[str, list[tuple[int, Tensor]]]) -> Tree:
        """The tree of all updates, newly allocated, from [(first row, updates)] of every stack."""
        full: dict[str, Tensor] = {}
        for name, found in pieces.items():
            parts = [values for _, values in found]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
            full[name] = whole.to(self.dtypes[name])
        if self.in_blocks:
            return {name: full[name] for name in self.names}
        stacks = self.all_blocks.stacks
        return self.spec.unflatten([full[n].view(stacks[n].block) for n in self.names])


def _present(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    raise ValueError(
        f"sharded: the gradient of '{name}' is None and its shape unknown: pass params to update."
    )


def described(own: Mapping[str, Piece], blocks: Blocks | Space) -> dict[str, dict[str, tuple[()]]]:
    """`ShardedState.owned`."""
    if blocks.in_blocks:
        return {s: {f"{p.first}:{p.first + p.rows}": ()} for s, p in own.items()}
    all_blocks = blocks.all_blocks if isinstance(blocks, Space) else blocks
    return {n: {"owned" if n in own else "elsewhere": ()} for n in all_blocks.stacks}
