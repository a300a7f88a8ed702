"""The memory of a state, by stage and by parameter."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any, NamedTuple, TextIO

from torch import Tensor

from funshampoo.core.placed import local_part
from funshampoo.core.text import readable
from funshampoo.state.nodes import check_is_state
from funshampoo.state.places import Place, map_tensors


class Memory(NamedTuple):
    """Bytes of a state.

    Attributes:
        total: bytes of the whole state.
        stages: {path of a stage's state: bytes}, in the order of the chain; the paths of stages
            inside `blocked` or `masked` are joined by "/".
        parameters: {parameter: bytes}; bytes of no single parameter, such as counters, are under
            "(shared)".
    """

    total: int
    stages: dict[str, int]
    parameters: dict[str, int]

    def __str__(self) -> str:
        stages = _table("stage", self.stages, self.total)
        parameters = _table("parameter", self.parameters, self.total)
        return "\n".join([*stages, "", *parameters])


def summary(state: Any, *, file: TextIO | None = None) -> Memory:
    """Print the memory of a state, by stage and by parameter, and return the numbers.

    Args:
        state: of any transformation; for the wrapper, one of `optimizer.chain_states()`. For a
            sharded one, this rank's part.
        file: where to print; standard output by default.

    Raises:
        TypeError: state is that of a torch.optim.Optimizer.

    Inside `blocked` a stack's bytes are divided by the blocks that each parameter has there.
    Elsewhere a leaf's name in its state is the parameter's.

    >>> import torch
    >>> from funshampoo import chain, scale_by_adam
    >>> tx = chain(scale_by_adam())
    >>> memory = summary(tx.init({"w": torch.zeros(4, 4)}))
    stage              bytes  share
    scale_by_adam      136 B   100%
    <BLANKLINE>
    parameter          bytes  share
    w                  136 B   100%
    >>> memory.total
    136
    """
    check_is_state(state)
    stages: dict[str, int] = defaultdict(int)
    parameters: dict[str, int] = defaultdict(int)

    def collect(place: Place, x: Tensor) -> None:
        size = local_part(x).nbytes
        stages["/".join(place.stage) or type(state).__name__] += size
        owners = [parameter for parameter, _ in place.owners()]
        if place.stack is None:
            owners = [".".join(place.leaf) or "(shared)"]
        for parameter, count in Counter(owners).items():
            parameters[parameter] += round(size * count / len(owners))

    map_tensors(collect, state)
    memory = Memory(sum(stages.values()), dict(stages), dict(parameters))
    print(memory, file=file or sys.stdout)
    return memory


def _table(title: str, rows: dict[str, int], total: int) -> list[str]:
    width = max([len(title), *map(len, rows), 16])
    lines = [f"{title:<{width}} {'bytes':>7}  share"]
    for name, size in rows.items():
        lines.append(f"{name:<{width}} {readable(size):>7}  {size / max(total, 1):>5.0%}")
    return lines
