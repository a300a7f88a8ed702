"""Failures in a row: the counts, the limit, and the error that names the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.modes import unwrapped
from funshampoo.core.placed import local_part, whole_numbers
from funshampoo.core.text import plural
from funshampoo.core.tree import flatten
from funshampoo.state.nodes import walk
from funshampoo.state.places import Place, map_tensors
from funshampoo.state.stages import GuardedState, Kept, SpikeState


class FailureLimitError(RuntimeError):
    """A block failed `max_failures` times in a row. Raised on every rank at the same step."""

    def __init__(
        self,
        message: str,
        max_failures: int = 0,
        everywhere: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.max_failures = max_failures
        self.everywhere = everywhere or list  # from this rank's blocks to those of all

    def __reduce__(self) -> Any:
        return type(self), (self.args[0], self.max_failures)


def failure_report(state: Any, device: torch.device | None = None) -> Tensor:
    """(4,) float32: blocks held, longest streak; roots failed, longest streak. Waits for nothing.

    Args:
        state: of any transformation; without a `guarded` in it the first two numbers are 0.
        device: of the report; by default that of the counters.
    """
    nodes = [node for _, node in walk(state)]
    guards = [node for node in nodes if isinstance(node, GuardedState)]
    refreshed = [node for node in nodes if isinstance(node, Kept)]
    held = [x for guard in guards for x in flatten(guard.held)[0]]
    streak = [x for guard in guards for x in flatten(guard.streak)[0]]
    numbers = [
        _reduced(held, torch.sum),
        _reduced(streak, torch.amax),
        _reduced([kept.failures for kept in refreshed], torch.sum),
        _reduced([kept.streak for kept in refreshed], torch.amax),
    ]
    if device is None:
        device = next((x.device for x in (*held, *(kept.residual for kept in refreshed))), None)
    return torch.stack([n.to(device, torch.float32) for n in numbers])


def _reduced(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum or the maximum over several tensors; 0 without any.

    Counters of DTensors are DTensors, whose meshes may differ; every rank has all of them.
    """
    parts = whole_numbers([reduce(x) for x in tensors if x.numel()])
    if not parts:
        return torch.zeros((), device="cpu")
    return reduce(torch.stack([x.to(parts[0].device) for x in parts]))


def limit_reached(report: Tensor, max_failures: int) -> bool:
    """Whether a streak in a `failure_report` has reached the limit. Waits for the device."""
    plain = unwrapped(report)
    if plain is None or plain.is_meta:
        return False
    return bool(plain.reshape(-1, 4)[:, 1::2].max() >= max_failures)


def failing_blocks(state: Any, max_failures: int) -> list[str]:
    """The blocks at the limit: "w block_0_1: gradient not finite". Waits for the device.

    Args:
        state: of a `blocked`, or of a transformation outside block space.
    """
    found: list[str] = []
    judged = any([isinstance(node, SpikeState) for _, node in walk(state)])
    bad = "gradient not finite, or a spike" if judged else "gradient not finite"

    def look(place: Place, x: Tensor) -> Tensor:
        plain = unwrapped(local_part(x))
        if place.path[-1:] != ("streak",) or plain is None:
            return x
        cause = "refresh of its statistics failed" if place.kind is Kept else bad
        worst = plain.reshape(-1, plain.shape[-1]).amax(0) if plain.ndim else plain.reshape(1)
        owners = place.owners()
        for i in (worst >= max_failures).nonzero().flatten().tolist():
            block = owners[i] if owners else (".".join(place.leaf) or "all parameters",)
            found.append(f"{' '.join(block)}: {cause}")
        return x

    map_tensors(look, state)
    return list(dict.fromkeys(found))


def failure_limit_error(
    blocks: Sequence[str],
    max_failures: int,
    everywhere: Callable[[list[str]], list[str]] | None = None,
) -> FailureLimitError:
    """The error that names the blocks."""
    listed = "; ".join(blocks[:5]) + (f"; and {len(blocks) - 5} more" if len(blocks) > 5 else "")
    return FailureLimitError(
        f"failed {plural(max_failures, 'time')} in a row (max_failures={max_failures}), or more "
        f"until this look: {listed}. A gradient that is not finite has entered nothing, and where "
        "a refresh failed the old value is in use. Look at the loss and the data of these steps, "
        "lower the learning rate; or go on, by max_failures=None (to the recipe, guarded or "
        "sharded) or guard=False (to adamw, sgd, lion and sign_descent, by other_options= of "
        "for_model).",
        max_failures,
        everywhere,
    )
