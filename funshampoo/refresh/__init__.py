"""What is computed now and then: rules, the schedule, threads and batches, what is kept."""

from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, Rule
from funshampoo.refresh.turns import RefreshSchedule

__all__ = ["Found", "RefreshSchedule", "Refreshing", "Rule"]
