"""Refreshes from the factor matrices of an earlier stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funshampoo.core.context import Context
from funshampoo.core.contract import Tree
from funshampoo.operators.mode_products import bias_corrected
from funshampoo.operators.weights import weights_over
from funshampoo.refresh.jobs import Reading
from funshampoo.refresh.refreshing import Refreshing
from funshampoo.state.partners import statistics_of
from funshampoo.state.stages import RefreshedState


def refreshed(
    refreshing: Refreshing, updates: Tree, state: RefreshedState, context: Context, stage: str
) -> RefreshedState:
    """`refreshing.update` with the matrices L_i / weight from upstream.

    Args:
        stage: the name of the calling stage, for error messages.

    Raises:
        ValueError: there are no factor matrices upstream, or one is missing.
    """
    statistics = statistics_of(context.upstream, stage, updates)
    inputs = statistics.factors, weights_over(statistics.weight, updates)

    def read(side: int, factors: Any, weight: Tensor) -> Reading:
        if not isinstance(factors[side], Tensor):
            raise ValueError(
                f"{stage} preconditions a side for which kronecker_statistics keeps no factor: "
                "give both stages the same exponents and sides."
            )
        return bias_corrected, factors[side], weight

    return refreshing.update(updates, state, inputs, read, context)
