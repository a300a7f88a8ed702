"""The clock: one step counter per state, a tensor there and an integer on the host.

The outermost transformation counts for everything inside, and passes it on in the context: `clock`,
the steps so far, and `step`, the number of this one.

What happens on a step (a refresh, the end of an accumulation) is decided on the host, so that no
branch depends on a device tensor and torch.compile sees a plain bool. The step number comes from
`step=` in the context or, without it, from the counter: a 0-dimensional int64 tensor on the CPU,
which can be read without waiting for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.core.context import Context, changed
from funshampoo.core.modes import is_traced, unwrapped

CLOCK = "clock"
"""The entry of a chain's state that holds its counter."""


def new_counter() -> Tensor:
    """A counter at zero: int64, 0-dimensional, on the CPU whatever the default device."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def read_counter(counter: Tensor) -> int | None:
    """The counter as an int; None inside torch.compile, where it has no value yet.

    Under torch.func.vmap each member of an ensemble has its own copy of the counter. As long as
    they agree, it is one number.

    Raises:
        ValueError: members of an ensemble are at different steps.
    """
    members = unwrapped(counter)
    if members is None:
        return None
    if members.ndim == 0:
        return int(members)
    first, last = int(members.min()), int(members.max())
    if first != last:
        raise ValueError(
            f"members of the ensemble are at different steps (from {first} to {last}), so they "
            "can't share one refresh: train them apart, or pass refresh=True or False."
        )
    return first


def started(counts: bool, clock: bool) -> Tensor | tuple[()]:
    """The counter of a stage that may be the outermost one; () if it is not, or needs none.

    Args:
        counts: whether anything inside needs the step number.
        clock: whether an enclosing transformation counts.
    """
    return new_counter() if counts and not clock else ()


def running(steps: Tensor | tuple[()], context: Context) -> Context:
    """The context inside a transformation that has this counter, or none."""
    if not isinstance(steps, Tensor):
        return context
    if context.step is not None:
        return changed(context, clock=steps)
    try:
        done = read_counter(steps)
    except ValueError:  # members of an ensemble may be at different steps if none needs the number
        if context.refresh is None:
            raise
        done = None
    return changed(context, clock=steps, step=None if done is None else done + 1)


def slowed(context: Context, k: int) -> Context:
    """The context for a part that runs on every k-th step only, counting its own steps."""
    step = None if context.step is None else context.step // k
    clock = None if context.clock is None else context.clock // k
    return changed(context, step=step, clock=clock)


def count_of(steps: Tensor | tuple[()], context: Context) -> Tensor:
    """The steps so far, by this counter or by the enclosing one."""
    count = steps if isinstance(steps, Tensor) else context.clock
    assert isinstance(count, Tensor), "init was told of a clock that update does not get"
    return count


def look_due(steps: Tensor | tuple[()], context: Context, every: int) -> bool:
    """Whether the failure counters are to be read before this step.

    They are read before multiples of `every`, like refreshes, but not before the first step; and
    before every step of an ensemble whose members are at different steps.
    """
    if torch.compiler.is_dynamo_compiling():
        return False  # failure counters can't be read there either
    inside = running(steps, context)
    if inside.step is None:
        return inside.clock is not None
    return inside.step > 1 and inside.step % every == 0


def advanced(steps: Tensor | tuple[()], donate: bool) -> Tensor | tuple[()]:
    """The counter after a step, in its own memory if it is donated and not traced."""
    if not isinstance(steps, Tensor):
        return ()
    return steps.add_(1) if donate and not is_traced() else steps + 1


def refresh_due(step: int, every: int, start: int = 1) -> bool:
    """Whether step number `step` (from 1) recomputes the roots.

    It does at `start` and at every multiple of `every` after it.

    >>> [t for t in range(1, 13) if refresh_due(t, every=5)]
    [1, 5, 10]
    >>> [t for t in range(1, 13) if refresh_due(t, every=5, start=5)]
    [5, 10]
    """
    return step == start or (step > start and step % every == 0)
