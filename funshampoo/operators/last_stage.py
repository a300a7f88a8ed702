"""Stages at the end of a chain, which see the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funshampoo.core.contract import GradientTransformation


def last_stage(
    init: Callable[..., Any],
    update: Callable[..., Any],
    *numbers: Any,
    counts: bool | None = None,
    elementwise: bool = True,
) -> GradientTransformation:
    """One that can't do without parameters. What it does to a row that is not alive is taken back.

    Args:
        numbers: its hyperparameters. By default it counts where one of them is a schedule.
    """
    return GradientTransformation(
        init,
        update,
        counts=any(map(callable, numbers)) if counts is None else counts,
        numbers=numbers,
        elementwise=elementwise,
        minds_alive=False,
        needs_params=True,
    )
