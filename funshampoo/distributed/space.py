"""What is shared out: the stacks of block space, or leaves as stacks of one row each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.blocks.layout import Stack
from funshampoo.core.contract import Tree
from funshampoo.core.modes import row_index
from funshampoo.core.tree import MaskedNode, compute_dtype, flatten, leaf_names
from funshampoo.distributed.shards import Blocks, Piece


class Space:
    """Stacks, or leaves as stacks of one row each: what they have in common.

    Args:
        tree: the stacks, or the tree of leaves.
        block_ndim: 1 for stacks.
        stacks: all stacks, where the tree holds nothing but this rank's rows already.
    """

    def __init__(
        self, tree: Tree, block_ndim: int, stacks: Mapping[str, Stack] | None = None
    ) -> None:
        self.in_blocks, self.cut = block_ndim > 0, stacks is not None
        leaves, self.spec = flatten(tree)
        if stacks is not None:
            self.names = list(stacks)
            self.blocks = {name: Blocks(s.block, s.rows) for name, s in stacks.items()}
            self._settle(
                {s.device for s in stacks.values()}, {n: s.dtype for n, s in stacks.items()}
            )
            return
        if self.in_blocks:
            self.names = list(tree)
            leaves = list(tree.values())
            self.blocks = {
                name: Blocks(tuple(x.shape[1:]), x.shape[0]) for name, x in zip(self.names, leaves)
            }
        else:
            self.names = leaf_names(tree)
            self.blocks = {
                name: Blocks(tuple(x.shape), 1) for name, x in self._present(leaves).items()
            }
        known = {n: x for n, x in zip(self.names, leaves) if isinstance(x, Tensor)}
        dtypes = {name: compute_dtype(x) for name, x in known.items()}
        self._settle({x.device for x in known.values()}, dtypes)

    def _settle(self, devices: set[torch.device], dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes
        self.dtype = torch.float64 if torch.float64 in dtypes.values() else torch.float32
        self.device = next(iter(devices), torch.device("cpu"))
        if len(devices) > 1:
            raise ValueError(
                "sharded: the parameters are on several devices; one buffer can't hold them. Use "
                "one sharded(...) a device, by partition(...)."
            )

    def _present(self, leaves: list[Any]) -> dict[str, Tensor]:
        for name, x in zip(self.names, leaves):
            if x is None:
                raise ValueError(
                    f"sharded: the gradient of '{name}' is None and its shape unknown: pass params "
                    "to update."
                )
        return dict(zip(self.names, leaves))

    def everything(self) -> dict[str, Piece]:
        """{stack: all its rows}."""
        return {stack: Piece(stack, 0, blocks.rows, 0) for stack, blocks in self.blocks.items()}

    def select(self, tree: Tree, own: Mapping[str, Piece]) -> Tree:
        """What this rank owns of a tree: views of rows; outside block space others are hidden."""
        if self.cut:
            return tree
        if self.in_blocks:
            return {s: tree[s].narrow(0, p.first, p.rows) for s, p in own.items()}
        leaves = self.spec.flatten_up_to(tree)
        shown = [x if n in own else MaskedNode() for n, x in zip(self.names, leaves)]
        return self.spec.unflatten(shown)

    def selected_context(
        self, context: Mapping[str, Any], own: Mapping[str, Piece]
    ) -> dict[str, Any]:
        """What of the context is a tree over the blocks."""
        selected: dict[str, Any] = {}
        if context.get("gradient") is not None:
            selected["gradient"] = self.select(context["gradient"], own)
        ids = context.get("block_ids")
        if ids is not None:
            selected["block_ids"] = {s: ids[s][p.first : p.first + p.rows] for s, p in own.items()}
        return selected

    def without(
        self, out: Tree, absent: Mapping[str, Collection[int]], own: Mapping[str, Piece]
    ) -> Tree:
        """The updates with zeros in the rows that had no gradient.

        Args:
            absent: {stack: rows of the full stack}.
        """
        if not self.in_blocks:
            return out  # there such an update is None already
        changed = dict(out)
        for stack, piece in own.items():
            rows = [
                r - piece.first for r in absent.get(stack, ()) if 0 <= r - piece.first < piece.rows
            ]
            if rows:
                index = row_index(tuple(sorted(rows)), out[stack].device)
                changed[stack] = out[stack].index_fill(0, index, 0.0)
        return changed

    def own_updates(self, out: Tree) -> dict[str, Tensor | None]:
        """{stack or leaf: update}, of those that this rank owns."""
        if self.in_blocks:
            return dict(out)
        return dict(zip(self.names, self.spec.flatten_up_to(out)))

    def rebuilt(self, pieces: Mapping[str, list[tuple[int, Tensor]]]) -> Tree:
        """The tree of all updates, newly allocated, from [(first row, updates)] of every stack."""
        full: dict[str, Tensor] = {}
        for name, found in pieces.items():
            parts = [values for _, values in found]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
            full[name] = whole.to(self.dtypes[name])
        if self.in_blocks:
            return {name: full[name] for name in self.names}
        return self.spec.unflatten([full[n].view(self.blocks[n].block) for n in self.names])

    def described(self, own: Mapping[str, Piece]) -> dict[str, dict[str, tuple[()]]]:
        """`ShardedState.owned`."""
        if self.in_blocks:
            return {s: {f"{p.first}:{p.first + p.rows}": ()} for s, p in own.items()}
        return {n: {"owned" if n in own else "elsewhere": ()} for n in self.names}
