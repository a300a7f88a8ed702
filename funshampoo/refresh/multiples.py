"""Statistics that are accumulated on some steps only."""

from __future__ import annotations

from funshampoo.core.clock import advanced, refresh_due, running, started
from funshampoo.core.context import Context
from funshampoo.core.contract import Block, GradientTransformation, Phase, Tree
from funshampoo.state.stages import EveryKState


def on_multiples(stage: GradientTransformation, every: int) -> GradientTransformation:
    """A stage that passes updates through, and runs on step 1 and multiples of `every` only.

    Unlike `every_k`, which accumulates updates for its part, it ignores those of other steps.
    """

    def init(params: Tree, *, block_ndim: int = 0, clock: bool = False) -> EveryKState:
        return EveryKState(stage.init(params, block_ndim=block_ndim), started(True, clock))

    def update(
        updates: Tree, state: EveryKState, params: Tree, context: Context
    ) -> tuple[Tree, EveryKState]:
        step, inner = running(state.steps, context).step, state.inner
        if step is None:
            raise RuntimeError(
                f"{stage.name}(every=...) accumulates on some steps, and can't read the counter "
                "inside torch.compile, or where members of an ensemble are at different steps: "
                "pass step= (from 1), or let funshampoo compile (compiled(tx))."
            )
        if refresh_due(step, every):
            inner = stage.run(updates, inner, params, context)[1]
        return updates, EveryKState(inner, advanced(state.steps, context.donate))

    def phase(step: int) -> Phase:
        return (f"statistics, every {every}",) if refresh_due(step, every) else ()

    def flops(block: Block, kept: Block) -> float:
        return stage.flops(block, kept) / every

    return GradientTransformation(
        init,
        update,
        stage.name,
        phase=phase,
        counts=True,
        numbers=stage.numbers,
        flops=flops,
        passes=True,
    )
