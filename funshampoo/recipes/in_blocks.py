"""What the recipes in block space share: guard, ranks, blocks, momentum, decay, learning rate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from funshampoo.blocks.blocking import blocked
from funshampoo.blocks.layout import Merge
from funshampoo.blocks.portions import TileSize
from funshampoo.combinators.chaining import chain
from funshampoo.combinators.guard import guarded
from funshampoo.combinators.masks import Mask
from funshampoo.core.checks import check_flags
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.live import is_exactly
from funshampoo.distributed.sharded import sharded
from funshampoo.transforms import add_decayed_weights, scale_by_learning_rate, trace
from funshampoo.transforms.weight_decay import DecayKind

Distribute: TypeAlias = Callable[..., GradientTransformation]


def in_blocks(
    stages: Sequence[GradientTransformation],
    *,
    learning_rate: Hyper | Schedule,
    every: int,
    max_size: int | None,
    merge: Merge,
    keep: int = 2,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    weight_decay_kind: DecayKind = "decoupled",
    decay_through_momentum: bool = False,
    peak_learning_rate: Hyper | None = None,
    mask: Mask | None = None,
    max_failures: int | None = 20,
    spike_factor: Hyper | None = None,
    distribute: Distribute | None = None,
    tile: TileSize = "auto",
    last: GradientTransformation | None = None,
) -> GradientTransformation:
    """The chain of a method whose direction these stages compute for every block; see `shampoo`.

    All of it is in one scope: what happens to a block, and where its state lives, is decided once.
    `last` replaces `scale_by_learning_rate`; one that averages weights has to see all of them, so
    there is no mask then.
    """
    check_flags(decay_through_momentum=decay_through_momentum)
    coupled = weight_decay_kind == "coupled"
    decay = add_decayed_weights(
        weight_decay,
        mask if coupled else None,  # in block space `blocked` applies it
        kind=weight_decay_kind,
        learning_rate=learning_rate,
        peak_learning_rate=peak_learning_rate,
    )
    heavy_ball = trace(momentum, nesterov=nesterov, dampening=dampening)
    if nesterov and is_exactly(momentum, 0):
        raise ValueError("nesterov needs momentum above 0.")
    decays = [] if is_exactly(weight_decay, 0) or mask is False else [decay]
    moves = [] if is_exactly(momentum, 0) else [heavy_ball]
    before, inside = (decays, []) if coupled else ([], decays)
    moved = [*inside, *moves] if decay_through_momentum else [*moves, *inside]
    if last is None:
        last = scale_by_learning_rate(learning_rate)
    elif mask is not None:
        raise ValueError("mask hides weights from the average: leave it out.")
    block_chain = chain(*stages, *moved, last)
    limits: Any = {"every": every, "max_failures": max_failures}
    protected = guarded(block_chain, spike_factor=spike_factor, **limits)
    blocks = blocked(
        distributed(protected, distribute, **limits),
        max_size,
        merge=merge,
        keep=keep,
        with_params=bool(block_chain.needs) and (True if mask is None else mask),
        tile=tile,
    )
    return chain(*before, blocks)


def distributed(
    inner: GradientTransformation, distribute: Distribute | None, **given: Any
) -> GradientTransformation:
    """What `distribute` makes of it, with these options, except for options of its own.

    None: blocks are sharded if the parameters are, as FSDP2 shards them, and not otherwise.

    Raises:
        TypeError: distribute is not a function.
    """
    if distribute is None:
        distribute = functools.partial(sharded, whole=False)
    if not callable(distribute):
        raise TypeError(
            f"distribute is {distribute!r}; give funshampoo.sharded, or a partial of it."
        )
    own = getattr(distribute, "keywords", {})  # those of a functools.partial come first
    return distribute(inner, **{k: v for k, v in given.items() if k not in own})


def by_leaves(
    stages: Sequence[GradientTransformation],
    learning_rate: Hyper | Schedule,
    distribute: Distribute | None,
    guard: bool,
) -> GradientTransformation:
    """The chain of an elementwise method; with `distribute`, each leaf runs only on its owner."""
    check_flags(guard=guard)
    whole = chain(*stages, scale_by_learning_rate(learning_rate))
    whole = guarded(whole, by_leaf=True) if guard else whole
    return whole if distribute is None else distributed(whole, distribute)
