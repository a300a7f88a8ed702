"""Checks for stages of one's own: torch and optree are all that they need."""

from funshampoo.testing.checking import check_stage
from funshampoo.testing.trial import StageError

__all__ = ["StageError", "check_stage"]
