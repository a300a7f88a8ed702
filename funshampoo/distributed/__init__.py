"""Data-parallel ranks: block ownership, and the chain that runs on the owned blocks."""

from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ownership import longest_processing_time, owners_of
from funshampoo.distributed.sharded import sharded

__all__ = ["CostModel", "longest_processing_time", "owners_of", "sharded"]
