"""Stages for the end of a chain, which need the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from funshampoo.core.contract import GradientTransformation
from funshampoo.core.traits import WEIGHS, with_traits


def last_stage(
    init: Callable[..., Any],
    update: Callable[..., Any],
    *numbers: Any,
    name: str = "",
    counts: bool | None = None,
    elementwise: bool = True,
    traits: Iterable[str] = (),
    passes: bool = False,
) -> GradientTransformation:
    """A stage that needs parameters. Its effect on rows that are not alive is undone.

    Args:
        name: by default that of the function that `update` was defined in.
        numbers: its hyperparameters. By default it counts steps if one of them is a schedule.
        traits: see `core.traits`.
    """
    stage = GradientTransformation(
        init,
        update,
        name,
        counts=any(map(callable, numbers)) if counts is None else counts,
        numbers=numbers,
        elementwise=elementwise,
        minds_alive=False,
        passes=passes,
        needs_params=True,
    )
    return with_traits(stage, WEIGHS, *traits)
