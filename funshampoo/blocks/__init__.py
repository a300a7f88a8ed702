"""Block space: parameters cut into stacks of equal blocks, and steps on them."""

from funshampoo.blocks.assembled import to_parameters
from funshampoo.blocks.blocking import blocked
from funshampoo.blocks.layout import merged_shape
from funshampoo.blocks.stacked import Stacked

__all__ = ["Stacked", "blocked", "merged_shape", "to_parameters"]
