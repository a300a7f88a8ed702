"""Data-parallel ranks: who owns which block, and the chain that runs on the owned ones."""

from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ownership import longest_processing_time, owners_of
from funshampoo.distributed.sharded import sharded

__all__ = ["CostModel", "longest_processing_time", "owners_of", "sharded"]
