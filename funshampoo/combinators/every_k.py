"""A transformation that runs on some steps only."""

from __future__ import annotations

from typing import Any

from funshampoo.core.checks import check_count
from funshampoo.core.clock import advanced, running, slowed, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Phase, Tree, as_transformation
from funshampoo.core.of_parts import check_of_every, checked_pair
from funshampoo.core.traits import refuse
from funshampoo.state.stages import EveryKState


def every_k(inner: GradientTransformation, k: int) -> GradientTransformation:
    """Run `inner` on the steps k, 2k, 3k, ...; on the others the updates pass through unchanged.

    `inner` counts its own steps: its first one is step k of this one. In between, its state does
    not change.

    Args:
        inner: any transformation.
        k: 1 or more.

    Context: `step=` decides in torch.compile, where the counter can't be read.

    State: `EveryKState`.

    Raises:
        ValueError, TypeError: k is not an int of at least 1.
        ValueError: `inner` scales by the learning rate, or rounds.
        RuntimeError: inside torch.compile without `step=`.

    >>> import torch
    >>> from funshampoo import scale
    >>> tx = every_k(scale(10.0), 2)
    >>> state = tx.init({"w": torch.zeros(1)})
    >>> for _ in range(3):
    ...     u, state = tx.update({"w": torch.ones(1)}, state)
    ...     print(u["w"])
    tensor([1.])
    tensor([10.])
    tensor([1.])
    """
    inner = as_transformation(inner)
    check_count("k", k)
    steps = (
        "in between, updates would be the gradients themselves, as steps uphill. multi_steps(tx, "
        "every) makes a step of several gradients; otherwise, put the learning rate behind."
    )
    rounds = "in between, updates would not be rounded: put it behind every_k(...)."
    refuse(inner, "every_k", flips=steps, rounds=rounds)

    def init(params: Tree, *, clock: bool = False, **context: Any) -> EveryKState:
        return EveryKState(inner.init(params, clock=True, **context), started(True, clock))

    def update(
        updates: Tree, state: EveryKState, params: Tree, context: Context
    ) -> tuple[Tree, EveryKState]:
        here = running(state.steps, context)
        if here.step is None:
            raise RuntimeError(
                "every_k can't read the step counter inside torch.compile: pass step= (from 1)."
            )
        new = state.inner
        if here.step % k == 0:
            found = inner.run(updates, state.inner, params, slowed(here, k))
            updates, new = checked_pair(found, inner.name)
        return updates, EveryKState(new, advanced(state.steps, context.donate))

    def phase(step: int) -> Phase:
        return (f"every {k}", *inner.phase(step // k)) if step % k == 0 else ()

    def saved(block: tuple[int, ...], kept: tuple[int, ...], apart: bool) -> float:
        """What a step saves, on average, of the products that `inner` declares; negative."""
        return (1 / k - 1) * inner.flops(block, kept, apart)

    return GradientTransformation(
        init,
        update,
        phase=phase,
        check=check_of_every(inner, k),
        parts={"inner": inner},
        counts=True,
        flops=saved,
        passes=inner.passes,
        elementwise=inner.elementwise,
    )
