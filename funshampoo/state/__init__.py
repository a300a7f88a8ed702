"""The states of the stages, as named tuples: checkpoints, and two reports."""

from typing import Any

from funshampoo.state.averages import (
    EmaNesterovState,
    PrimalAverageState,
    ScheduleFreeState,
    TailAverageState,
)
from funshampoo.state.checkpoint import Loaded, check, load_state_dict, state_dict
from funshampoo.state.health import Health, health
from funshampoo.state.meaning import meaning
from funshampoo.state.memory import Memory, summary
from funshampoo.state.nodes import find_state
from funshampoo.state.parts import merged
from funshampoo.state.stages import (
    AdagradState,
    AdamState,
    BlockedState,
    ClockState,
    EmaState,
    EveryKState,
    GraftState,
    GuardedState,
    HyperparamsState,
    Kept,
    KroneckerState,
    LearningRateState,
    MaskedState,
    MultiStepsState,
    PartitionState,
    RefreshedState,
    RmsState,
    RowsState,
    ScheduleState,
    ShardedState,
    SpikeState,
    TraceState,
    WrappedState,
)
from funshampoo.state.stateful import Checkpoint

__all__ = [
    "AdagradState",
    "AdamState",
    "BlockedState",
    "Checkpoint",
    "ClockState",
    "EmaNesterovState",
    "EmaState",
    "EveryKState",
    "GraftState",
    "GuardedState",
    "Health",
    "HyperparamsState",
    "Kept",
    "KroneckerState",
    "LearningRateState",
    "Loaded",
    "MaskedState",
    "Memory",
    "MultiStepsState",
    "PartitionState",
    "PrimalAverageState",
    "RefreshedState",
    "RmsState",
    "RowsState",
    "ScheduleFreeState",
    "ScheduleState",
    "ShardedState",
    "SpikeState",
    "TailAverageState",
    "TraceState",
    "WrappedState",
    "check",
    "find_state",
    "health",
    "load_state_dict",
    "meaning",
    "merged",
    "state_dict",
    "summary",
]


def __getattr__(name: str) -> Any:
    # It was here in 0.1; `migrate` is built on this package and can't be imported above.
    if name == "seed_from_adamw":
        from funshampoo.migrate.seeding import seed_from_adamw

        return seed_from_adamw
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
