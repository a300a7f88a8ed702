"""What the stages remember, as named tuples, and two reports on it."""

from funshampoo.state.health import Health, health
from funshampoo.state.memory import Memory, summary
from funshampoo.state.stages import (
    AdagradState,
    AdamState,
    BlockedState,
    EmaState,
    FactorRoot,
    GraftState,
    GuardedState,
    HyperparamsState,
    KroneckerState,
    MaskedState,
    MultiStepsState,
    PartitionState,
    RmsState,
    RootInverseState,
    ScheduleState,
    ShardedState,
    TraceState,
    find_state,
)

__all__ = [
    "AdagradState",
    "AdamState",
    "BlockedState",
    "EmaState",
    "FactorRoot",
    "GraftState",
    "GuardedState",
    "Health",
    "HyperparamsState",
    "KroneckerState",
    "MaskedState",
    "Memory",
    "MultiStepsState",
    "PartitionState",
    "RmsState",
    "RootInverseState",
    "ScheduleState",
    "ShardedState",
    "TraceState",
    "find_state",
    "health",
    "summary",
]
