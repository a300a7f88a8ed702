"""The cost of a job for each rank, planned in advance, from shapes alone, without any memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor, nn

from funshampoo.blocks.layout import Merge
from funshampoo.core.checks import check_count
from funshampoo.core.contract import GradientTransformation, as_transformation
from funshampoo.core.text import aligned, counted, duration, plural, readable
from funshampoo.core.tree import compute_dtype, flatten
from funshampoo.distributed.cost import BY_SIZE, DEFAULT_COST, CostModel, Seconds
from funshampoo.distributed.ownership import owners_of
from funshampoo.distributed.sharded import sharded
from funshampoo.plan.scopes import Scope, scopes_of
from funshampoo.plan.shapes import model_shapes
from funshampoo.recipes.shampoo import shampoo


class StackPlan(NamedTuple):
    """The blocks of one shape, and their owners.

    Attributes:
        block: their shape.
        owners: the rank of every row, ascending.
        seconds: modelled seconds per step of one block.
        state_bytes: bytes of state of one block.
    """

    block: tuple[int, ...]
    owners: tuple[int, ...]
    seconds: Seconds
    state_bytes: int

    @property
    def rows(self) -> int:
        """How many blocks there are."""
        return len(self.owners)


class RankPlan(NamedTuple):
    """The share of one rank.

    Attributes:
        blocks: the number of blocks that it owns.
        elements: the number of parameter elements in its blocks, which it sends on every step.
        seconds: modelled seconds per step; `seconds.roots` is its root work.
        state_bytes: for its blocks, and for state that every rank keeps.
    """

    blocks: int
    elements: int
    seconds: Seconds
    state_bytes: int


class Plan(NamedTuple):
    """The result of `plan`. `str` of it is a table.

    Attributes:
        parameters: number of tensors.
        elements: number of their elements.
        every: steps between two refreshes.
        stacks: {stack, or leaf that is sharded whole: `StackPlan`}.
        ranks: one `RankPlan` per rank.
        replicated_elements: elements that are not sharded, which every rank updates itself.
        replicated_bytes: bytes of state outside blocks, such as counters, which every rank keeps.
        parameter_bytes: of the parameters, all held by every rank, with gradients of as many bytes.
        gathered_bytes: bytes that every rank holds after gathering all updates of a step: in each
            collective all shards are as long as the longest.
    """

    parameters: int
    elements: int
    every: int
    stacks: dict[str, StackPlan]
    ranks: tuple[RankPlan, ...]
    replicated_elements: int
    replicated_bytes: int
    parameter_bytes: int
    gathered_bytes: int

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return sum(stack.rows for stack in self.stacks.values())

    @property
    def balance(self) -> float:
        """Largest over mean modelled seconds of a rank; 1 is perfect."""
        return _over_mean(max(rank.seconds.total for rank in self.ranks), self.ranks)

    @property
    def best_balance(self) -> float:
        """A lower bound on `balance` for whole blocks: some rank has the most expensive one."""
        dearest = max((stack.seconds.total for stack in self.stacks.values()), default=0.0)
        return max(1.0, _over_mean(dearest, self.ranks))

    def __str__(self) -> str:
        return "\n".join([*_heading(self), "", *_stack_table(self), "", *_rank_table(self)])


def plan(
    model: str | nn.Module | Mapping[str, Any],
    world_size: int,
    *,
    max_size: int | None = 1024,
    merge: Merge = "small",
    keep: int = 2,
    every: int = 10,
    transformation: GradientTransformation | None = None,
    dtype: torch.dtype = torch.float32,
    communication_dtype: torch.dtype | None = None,
    cost: CostModel | None = None,
) -> Plan:
    """Plan which rank owns which block, and the cost to each in time, memory and communication.

    It needs no device, no process group and no memory: everything is computed on meta tensors. The
    owners are those of a job with the same shapes, options and `cost`.

    Args:
        model: a module (its parameters that require gradients; it may be on the meta device), a
            tree of tensors, {name: shape}, or the name of a model in
            `funshampoo.plan.shapes.MODELS`.
        world_size: number of ranks that share the blocks.
        max_size, merge, keep: as in `shampoo`, whose other options have their defaults.
        every: steps between two refreshes, over which the cost of roots is spread.
        transformation: instead of `shampoo`, any recipe or chain; every `blocked` in it, and every
            `sharded` elsewhere, is planned. Make a recipe with distribute=funshampoo.sharded, which
            does nothing without ranks, so that leaves outside blocks are sharded as in the job. It
            has its own blocks, so leave out max_size, merge and keep; `every` has to be repeated
            here.
        dtype: of parameters given as shapes.
        communication_dtype: in which updates are gathered; by default the dtype that they are
            computed in, float32 for half precision.
        cost: as in `sharded`; `benchmarks/cost_model.py` measures one.

    Raises:
        ValueError: a number out of range, an unknown name, a transformation with nothing to shard,
            or one together with max_size, merge or keep.
        TypeError: a parameter that is neither a tensor nor a shape, or whose dtype can't be
            optimized.

    >>> found = plan({"w": (96, 64), "b": (96,)}, world_size=2, max_size=32)
    >>> found.blocks, {name: stack.owners for name, stack in found.stacks.items()}
    (9, {'32': (0, 0, 1), '32x32': (0, 0, 0, 1, 1, 1)})
    >>> [rank.elements for rank in found.ranks], found.gathered_bytes
    ([3136, 3104], 25088)
    """
    check_count("world_size", world_size)
    check_count("every", every)
    if transformation is None:
        transformation = shampoo(
            1e-3, max_size=max_size, merge=merge, keep=keep, every=every, distribute=sharded
        )
    elif (max_size, merge, keep) != (1024, "small", 2):
        raise ValueError(
            "transformation has blocks of its own: set max_size, merge and keep in its blocked(...)"
        )
    params = meta_parameters(model, dtype)
    transformation = as_transformation(transformation)
    state = transformation.init(params)
    shared = scopes_of(transformation, state, params)
    scopes = [_planned(scope, world_size, every, cost) for scope in shared]
    stacks: dict[str, StackPlan] = {}
    for number, own in enumerate(scopes, start=1):  # if a name repeats, later ones get a number
        stacks |= {f"{n} ({number})" if n in stacks else n: s for n, s in own.items()}
    in_blocks = sum(stack.rows * stack.state_bytes for stack in stacks.values())
    replicated_bytes = sum(x.nbytes for x in flatten(state)[0]) - in_blocks
    ranks = _rank_plans(stacks, world_size, replicated_bytes)
    leaves: list[Tensor] = flatten(params)[0]
    elements = sum(leaf.numel() for leaf in leaves)
    widest = max((compute_dtype(leaf) for leaf in leaves), key=lambda t: t.itemsize, default=dtype)
    longest = [max(r.elements for r in _rank_plans(s, world_size, 0)) for s in scopes]
    return Plan(
        parameters=len(leaves),
        elements=elements,
        every=every,
        stacks=stacks,
        ranks=ranks,
        replicated_elements=elements - sum(rank.elements for rank in ranks),
        replicated_bytes=replicated_bytes,
        parameter_bytes=sum(leaf.numel() * leaf.dtype.itemsize for leaf in leaves),
        gathered_bytes=world_size * sum(longest) * (communication_dtype or widest).itemsize,
    )


def _planned(
    scope: Scope, world_size: int, every: int, cost: CostModel | None
) -> dict[str, StackPlan]:
    balanced = cost or (DEFAULT_COST if scope.in_blocks else BY_SIZE)  # as in `sharded`
    works = scope.works if scope.in_blocks else None
    owners = owners_of(scope.blocks, world_size, every, balanced, works)
    model = cost or DEFAULT_COST
    return {
        name: StackPlan(
            equal.block,
            owners[name],
            model.parts(equal.block, every, *scope.works[name]),
            scope.state_bytes[name],
        )
        for name, equal in scope.blocks.items()
    }


def _in_dicts(tree: Any) -> Any:
    """The tree with dicts for mappings of other kinds, at any depth."""

    def opened(x: Any) -> Any:
        return _in_dicts(dict(x)) if isinstance(x, Mapping) else x

    return optree.tree_map(opened, tree, none_is_leaf=True)


def meta_parameters(model: str | nn.Module | Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The tree of meta tensors with the model's shapes; see `plan`.

    Raises:
        ValueError: an unknown name.
        TypeError: a leaf that is neither a tensor nor a shape; names it.

    >>> meta_parameters({"w": (2, 3)}, torch.float32)
    {'w': tensor(..., device='meta', size=(2, 3))}
    """
    if isinstance(model, str):
        model = model_shapes(model)
    elif isinstance(model, nn.Module):
        model = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model = _in_dicts(model)
    leaves = flatten(model)[0]
    of_tensors = bool(leaves) and all(isinstance(x, Tensor) for x in leaves)

    def is_shape(node: Any) -> bool:  # in a tree of tensors, () is a tree without leaves
        of_sides = isinstance(node, list | tuple) and (node or not of_tensors)
        return bool(of_sides) and all(isinstance(d, int) and d >= 0 for d in node)

    def on_meta(at: optree.PyTreeAccessor, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return torch.empty(x.shape, dtype=x.dtype, device="meta")
        if is_shape(x):
            return torch.empty(tuple(x), dtype=dtype, device="meta")
        raise TypeError(
            f"{at.codify('model')} is {x!r}; expected a tensor or a shape, such as (64, 32)."
        )

    tree: Any = model
    return optree.tree_map_with_accessor(on_meta, tree, is_leaf=is_shape, none_is_leaf=True)


def _rank_plans(
    stacks: Mapping[str, StackPlan], world_size: int, replicated_bytes: int
) -> tuple[RankPlan, ...]:
    """The blocks of each rank, added up."""
    blocks, elements = [0] * world_size, [0] * world_size
    seconds = [Seconds(0.0, 0.0, 0.0)] * world_size
    state_bytes = [replicated_bytes] * world_size
    for stack in stacks.values():
        numel = math.prod(stack.block)
        for rank in stack.owners:
            blocks[rank] += 1
            elements[rank] += numel
            seconds[rank] = Seconds(*(a + b for a, b in zip(seconds[rank], stack.seconds)))
            state_bytes[rank] += stack.state_bytes
    return tuple(map(RankPlan, blocks, elements, seconds, state_bytes))


def _over_mean(seconds: float, ranks: Sequence[RankPlan]) -> float:
    mean = sum(rank.seconds.total for rank in ranks) / len(ranks)
    return seconds / mean if mean > 0 else 1.0


def _heading(found: Plan) -> list[str]:
    lines = [
        f"{plural(found.parameters, 'parameter')}, {plural(found.elements, 'element')}, in "
        f"{plural(found.blocks, 'block')} of {plural(len(found.stacks), 'shape')}, owned by "
        f"{plural(len(found.ranks), 'rank')}.",
        f"Balance (largest / mean modelled time): {found.balance:.3f}.",
        "Times are modelled for one CPU thread: compare them with each other.",
    ]
    if found.best_balance > 1.05:
        lines.append(
            f"The dearest block alone is {found.best_balance:.2f} times a rank's mean: smaller "
            "blocks (max_size), where the method has them, or fewer ranks would balance better."
        )
    if found.replicated_elements:
        lines.append(
            f"In no block: {plural(found.replicated_elements, 'element')}, which all ranks do."
        )
    return lines


_STACKS_SHOWN = 12


def _stack_table(found: Plan) -> list[str]:
    """The most expensive stacks, in descending order."""

    def total(item: tuple[str, StackPlan]) -> float:
        return item[1].rows * item[1].seconds.total

    whole = sum(map(total, found.stacks.items())) or 1.0
    ordered = sorted(found.stacks.items(), key=total, reverse=True)
    lines = [("blocks", "number", "owners", "time/block", "share", "state/block")]
    for name, stack in ordered[:_STACKS_SHOWN]:
        owners, share = len(set(stack.owners)), total((name, stack)) / whole
        costs = duration(stack.seconds.total), f"{share:.1%}", readable(stack.state_bytes)
        lines.append((name, f"{stack.rows:,}", f"{owners:,}", *costs))
    rest = ordered[_STACKS_SHOWN:]
    if rest:
        rows, share = sum(s.rows for _, s in rest), sum(map(total, rest)) / whole
        lines.append((f"and {len(rest)} more", f"{rows:,}", "", "", f"{share:.1%}", ""))
    return aligned(lines)


def _rank_table(found: Plan) -> list[str]:
    """Smallest, mean and largest over the ranks, for each quantity of a rank."""
    seconds = [rank.seconds for rank in found.ranks]
    rows: list[Row] = [
        ("blocks", [rank.blocks for rank in found.ranks], counted),
        ("elements sent", [rank.elements for rank in found.ranks], counted),
        ("state", [rank.state_bytes for rank in found.ranks], readable),
        ("parameters", [found.parameter_bytes], readable),
        ("gradients", [found.parameter_bytes], readable),
        ("gathered updates", [found.gathered_bytes], readable),
        ("time per step", [s.total for s in seconds], duration),
        ("  products", [s.products for s in seconds], duration),
        (f"  roots / {found.every}", [s.roots for s in seconds], duration),
        ("  memory traffic", [s.memory for s in seconds], duration),
    ]
    return spread_table(rows)


Row: TypeAlias = tuple[str, Sequence[float], Callable[[float], str]]
"""(title, one number per rank, how it is formatted)"""


def spread_table(rows: Sequence[Row]) -> list[str]:
    """Smallest, mean and largest over the ranks."""
    lines: list[Sequence[str]] = [("per rank", "smallest", "mean", "largest")]
    for title, values, written in rows:
        cells = min(values), sum(values) / len(values), max(values)
        lines.append((title, *map(written, cells)))
    return aligned(lines)
