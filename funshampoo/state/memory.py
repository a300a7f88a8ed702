"""Where the memory of a state goes."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any, NamedTuple, TextIO

from torch import Tensor

from funshampoo.state.stages import BlockedState, FactorRoot, KroneckerState, walk


class Memory(NamedTuple):
    """Bytes of a state.

    Attributes:
        total: all of it.
        stages: {path of a stage's state: bytes}, in the order of the chain; the paths of stages
            inside `blocked` or `masked` are joined by "/".
        parameters: {parameter: bytes}; what belongs to no single one, such as counters, is under
            "(shared)".
    """

    total: int
    stages: dict[str, int]
    parameters: dict[str, int]

    def __str__(self) -> str:
        return "\n".join(
            [
                *_table("stage", self.stages, self.total),
                "",
                *_table("parameter", self.parameters, self.total),
            ]
        )


def summary(state: Any, *, file: TextIO | None = None) -> Memory:
    """Print where the memory of a state goes, by stage and by parameter, and return the numbers.

    Args:
        state: of any transformation.
        file: where to print; standard output by default.

    Inside `blocked` a stack's bytes are shared out by the blocks that each parameter has there.
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
    stages: dict[str, int] = defaultdict(int)
    parameters: dict[str, int] = defaultdict(int)
    for leaf in _leaves(state):
        size = leaf.tensor.numel() * leaf.tensor.element_size()
        stages[leaf.stage] += size
        for parameter, share in leaf.shares:
            parameters[parameter] += round(size * share)
    memory = Memory(sum(stages.values()), dict(stages), dict(parameters))
    print(memory, file=file or sys.stdout)
    return memory


class _Leaf(NamedTuple):
    tensor: Tensor
    stage: str
    shares: list[tuple[str, float]]


def _leaves(state: Any) -> list[_Leaf]:
    """Every tensor of a state with the stage it belongs to and the parameters it is for."""
    leaves = []
    open_blocks: list[tuple[tuple[str, ...], BlockedState]] = []
    for path, node in walk(state):
        if isinstance(node, BlockedState):
            open_blocks.append((path, node))
        if not isinstance(node, Tensor):
            continue
        around = [b for p, b in open_blocks if path[: len(p)] == p]
        stage, inside = _split(state, path)
        owners = _owners(around[-1]) if around else {}
        stack = next((key for key in inside if key in owners), None)
        if stack is not None:
            shares = owners[stack]
        elif around or not inside or "hyperparams" in path:
            shares = [("(shared)", 1.0)]
        else:
            shares = [(".".join(inside), 1.0)]
        leaves.append(_Leaf(node, stage, shares))
    return leaves


_HOLDS_A_STATE = ("inner", "direction", "onto")  # fields in which a combinator keeps another's


def _split(state: Any, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """A leaf's path as (stage, the part below the innermost stage's field).

    Dicts of states are those of chains and partitions: at the top, in a combinator's field, and
    directly inside one another. Any other dict is a tree of the stage that it is found in.
    """
    stage: list[str] = []
    node, of_states, below = state, True, 0
    for i, key in enumerate(path):
        if isinstance(node, FactorRoot):
            return "/".join(stage), path[below : i - 1]  # ends with the side
        if isinstance(node, KroneckerState) and key == "factors":
            return "/".join(stage) or "KroneckerState", path[i + 1 : -1]
        if hasattr(node, "_fields"):
            of_states, below = key in _HOLDS_A_STATE, i + 1
            if key in ("direction", "onto"):
                stage.append(key)
        elif of_states and isinstance(node, dict):
            stage.append(key)
            below = i + 1
        node = _child(node, key)
    return "/".join(stage) or type(state).__name__, path[below:]


def _child(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        return next(child for name, child in node.items() if str(name) == key)
    return getattr(node, key) if hasattr(node, "_fields") else node[int(key)]


def _owners(blocked: BlockedState) -> dict[str, list[tuple[str, float]]]:
    """{stack: [(parameter, its share of the rows), ...]}."""
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for parameter, stacks in blocked.layout.items():
        for stack, spans in stacks.items():
            for span in spans:
                first, last = map(int, span.split(":"))
                rows[stack][parameter] = rows[stack].get(parameter, 0) + last - first
    return {
        stack: [(parameter, n / sum(counts.values())) for parameter, n in counts.items()]
        for stack, counts in rows.items()
    }


def _table(title: str, rows: dict[str, int], total: int) -> list[str]:
    width = max([len(title), *map(len, rows), 16])
    lines = [f"{title:<{width}} {'bytes':>7}  share"]
    for name, size in rows.items():
        lines.append(f"{name:<{width}} {_readable(size):>7}  {size / max(total, 1):>5.0%}")
    return lines


def _readable(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
