"""What stages at the end of a chain need besides updates: parameters, and the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from funshampoo.core.clock import count_of
from funshampoo.core.context import Context
from funshampoo.core.live import value_at

if TYPE_CHECKING:
    from funshampoo.core.contract import Hyper, Schedule


def without_parameters(stage: str, block_ndim: int) -> ValueError:
    """The error for a step without parameters, which this stage requires."""
    remedy = "blocked(..., with_params=True)" if block_ndim else "pass params to update"
    return ValueError(f"{stage} needs the parameters: {remedy}.")


def rate_of(rate: Hyper | Schedule, steps: Tensor | tuple[()], context: Context) -> Any:
    """The value of a number, live number or schedule on this step.

    Args:
        steps: the stage's own counter, () if an enclosing one counts.
    """
    count = count_of(steps, context) if callable(rate) else None
    return value_at(rate, count, context.hyper)
