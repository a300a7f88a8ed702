"""Periodic computations: rules, schedules, threads and batches, and the values that are kept."""

from funshampoo.refresh.refreshing import Refreshing
from funshampoo.refresh.rule import Found, Rule
from funshampoo.refresh.turns import RefreshSchedule

__all__ = ["Found", "RefreshSchedule", "Refreshing", "Rule"]
