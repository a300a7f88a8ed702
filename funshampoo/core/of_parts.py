"""What a combinator inherits from its parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from funshampoo.core.clock import CLOCK, running, slowed
from funshampoo.core.context import Context

if TYPE_CHECKING:
    from funshampoo.core.contract import GradientTransformation


def united(*names: Collection[str] | None) -> frozenset[str] | None:
    """All names together; None, meaning any, if one of them is."""
    known = [own for own in names if own is not None]
    return frozenset().union(*known) if len(known) == len(names) else None


def checks_of(
    parts: Mapping[str, GradientTransformation], state_of: Callable[[Any, str], Any]
) -> Callable[[Any, Context], None]:
    """The checks of all parts that have one."""
    own = {name: part for name, part in parts.items() if part.checks}

    def check(state: Any, context: Context) -> None:
        inside = running(steps_of(state), context)
        for name, part in own.items():
            try:
                kept = state_of(state, name)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"the state is another transformation's: it has nothing for '{name}'. Build "
                    "the one that made it, or call init."
                ) from error
            part.check(kept, inside)

    return check


def check_of_every(inner: GradientTransformation, k: int) -> Callable[[Any, Context], None]:
    """The check for a part that runs on every k-th step only, before such a step."""

    def check(state: Any, context: Context) -> None:
        here = running(state.steps, context)
        if inner.checks and here.step is not None and here.step % k == 0:
            inner.check(state.inner, slowed(here, k))

    return check


def steps_of(state: Any) -> Any:
    """The counter of a state that counts for itself and its contents; () if it has none."""
    own = state.get(CLOCK) if isinstance(state, dict) else state
    return getattr(own, "steps", ())


def checked_pair(result: Any, stage: str) -> tuple[Any, Any]:
    """Check that a stage returned a pair.

    Raises:
        TypeError: it is not a pair.
    """
    if type(result) is tuple and len(result) == 2:
        return result
    raise TypeError(
        f"the update of stage '{stage}' returned a {type(result).__name__}; it has to return a "
        "pair, (updates, state). A stage without a state returns the one that it was given."
    )
