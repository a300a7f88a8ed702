"""Primal averaging: Schedule-Free with an exponential average."""

from __future__ import annotations

from torch import Tensor

from funshampoo.core.checks import check_range, check_rate
from funshampoo.core.clock import advanced, started
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule, Tree
from funshampoo.core.live import number
from funshampoo.core.needs import rate_of
from funshampoo.core.traits import DIRECTED, FLIPS, TRACKS
from funshampoo.core.tree import update_leaves
from funshampoo.operators.averaged import copies, interpolated_step
from funshampoo.operators.last_stage import last_stage
from funshampoo.state.averages import PrimalAverageState
from funshampoo.state.stages import LearningRateState


def primal_average(
    learning_rate: Hyper | Schedule, *, average: Hyper, interpolation: Hyper
) -> GradientTransformation:
    """Generalized primal averaging: gradients are taken at the parameters y; evaluate with x.

        z ← z - α U
        x ← average x + (1 - average) z
        y ← interpolation x + (1 - interpolation) z

    Put it at the end of a chain instead of `scale_by_learning_rate`. x is
    `funshampoo.evaluation_parameters(state, params)`. α may follow a schedule; the weights in the
    average do not depend on it.

    x and z are in float32 or wider. With average=0 and interpolation=0 they are master weights for
    parameters in half precision, which would round small steps away: y is z, rounded. After a
    recipe, whose updates already include learning rate and sign:

        chain(soap(1e-4), scale(-1.0), primal_average(1.0, average=0.0, interpolation=0.0))

    Args:
        learning_rate: α: number, tensor, or schedule of the old step count.
        average: decay of the average, in [0, 1).
        interpolation: in [0, 1].

    State: `PrimalAverageState`: x and z, two numbers per parameter.

    Raises:
        ValueError: an argument out of range; from update, params missing.

    Reference: Defazio et al., arXiv 2512.17131 (generalized primal averaging).

    >>> import torch
    >>> tx = primal_average(0.5, average=0.75, interpolation=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
    {'w': tensor([-0.3125])}
    """
    check_rate(learning_rate)
    check_range("average", average, 0.0, 1.0, high_open=True)
    check_range("interpolation", interpolation, 0.0, 1.0)
    scheduled = callable(learning_rate)

    def init(params: Tree, *, clock: bool = False) -> PrimalAverageState:
        rate = LearningRateState(started(scheduled, clock))
        return PrimalAverageState(copies(params), copies(params), rate)

    def update(
        updates: Tree, state: PrimalAverageState, params: Tree, context: Context
    ) -> tuple[Tree, PrimalAverageState]:
        rate = rate_of(learning_rate, state.rate.steps, context)
        share, between = 1 - number(average, context.hyper), number(interpolation, context.hyper)

        def leaf(u: Tensor, y: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
            return interpolated_step(u, y, x, z, rate, share, between, context.donate)

        step, x, z = update_leaves(leaf, updates, (state.evaluated, state.fast), (params,))
        steps = advanced(state.rate.steps, context.donate)
        return step, PrimalAverageState(x, z, LearningRateState(steps))

    traits = (DIRECTED, FLIPS, TRACKS)
    return last_stage(init, update, learning_rate, average, interpolation, traits=traits)
