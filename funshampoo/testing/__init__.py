"""Checks for your own stages. They need only torch and optree."""

from funshampoo.testing.checking import check_stage
from funshampoo.testing.trial import StageError

__all__ = ["StageError", "check_stage"]
