"""What stages at the end of a chain need beside their updates: parameters, and the rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from funshampoo.core.live import Numbers, number

if TYPE_CHECKING:
    from funshampoo.core.contract import Hyper, Schedule


def required(params: Any, stage: str, block_ndim: int) -> Any:
    """The parameters, for a stage that can't do without.

    Raises:
        ValueError: they are None. Names the stage and the remedy.
    """
    if params is None:
        remedy = "blocked(..., with_params=True)" if block_ndim else "pass params to update"
        raise ValueError(f"{stage} needs the parameters: {remedy}.")
    return params


def rate_of(
    rate: Hyper | Schedule, steps: Tensor | tuple[()], clock: Tensor | None, hyper: Numbers
) -> Any:
    """A number, live number or schedule as it is on this step.

    Args:
        steps: the stage's own counter, () where somebody around counts, by `clock`.
    """
    if not callable(rate):
        return number(rate, hyper)
    count = steps if isinstance(steps, Tensor) else clock
    assert count is not None, "init was told of a clock that update does not get"
    return rate(count)
